# Completion of squeeze's command line in fish. What there is the program itself says (--list-options), in lines of a name,
# a short form, an argument, choices and help, separated by tabs: nothing here goes out of date.

# Prints what may stand at the cursor; nothing where files may.
function __squeeze_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l asked $words[1]
    set -e words[1]
    set -l list ($asked --list-options 2>/dev/null)
    # Words in front that choose a command, and a subject of it.
    while set -q words[1]; and not string match -q -- '-*' $words[1]
        and string match -q -- (string escape --style=regex -- $words[1])\t'*' $list
        test $words[1] = help; or set asked $asked $words[1]
        set -e words[1]
        set list ($asked --list-options 2>/dev/null)
    end
    for line in $list
        set -l fields (string split \t -- $line)
        if set -q words[1]; and contains -- $words[-1] $fields[1] $fields[2]; and test -n "$fields[3]"
            switch $fields[3]
                case FOLDER
                    __fish_complete_directories $current
                case FILE CONTEXT
                    __fish_complete_path $current
                case '*'
                    string split , -- $fields[4]
            end
            return
        end
    end
    set -l shown
    for line in $list
        set -l fields (string split \t -- $line)
        string match -q -- '-*' $fields[1]; and not string match -q -- '-*' $current; and continue
        set shown 1
        printf '%s\t%s\n' $fields[1] $fields[5]
        test -n "$fields[2]"; and printf '%s\t%s\n' $fields[2] $fields[5]
    end
    set -q shown[1]; or __fish_complete_path $current
end

complete -c squeeze -f -a '(__squeeze_complete)'
