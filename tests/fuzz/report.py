"""Table of a fuzz run, and its JSON: what scripts/fuzz.sh prints.

    report.py BUILD SECONDS JOBS CLANG JSON TARGET...     JSON: a file, "-" for standard output, "" for none

Reads the logs of libFuzzer in BUILD/log, findings in BUILD/found and llvm-cov's summaries in BUILD/profile. Exit code 1
when something was found.
"""
import glob
import json
import os
import platform
import re
import subprocess
import sys


def executions(build, target):
    total = 0
    for path in glob.glob(f"{build}/log/{target}-*"):
        with open(path, errors="replace") as log:
            text = log.read()
        numbers = re.findall(r"^#(\d+)\s|number_of_executed_units: (\d+)", text, re.M)
        total += max((int(a or b) for a, b in numbers), default=0)
    return total


def store_lines(build, name):
    """Reached and all lines of store/, or None without coverage."""
    try:
        with open(f"{build}/profile/{name}.json") as file:
            lines = json.load(file)["data"][0]["totals"]["lines"]
    except FileNotFoundError:
        return None
    return lines["covered"], lines["count"]


def file_lines(build):
    try:
        with open(f"{build}/profile/all.json") as file:
            files = json.load(file)["data"][0]["files"]
    except FileNotFoundError:
        return {}
    return {os.path.basename(f["filename"]): f["summary"]["lines"] for f in files}


def share(lines):
    return round(lines[0] / lines[1], 4) if lines and lines[1] else None


def first_line(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[0]


def cpu():
    with open("/proc/cpuinfo") as file:
        names = re.findall(r"^model name\s*: (.*)$", file.read(), re.M)
    return names[0] if names else platform.machine()


def main():
    build, seconds, jobs, clang, out = sys.argv[1:6]
    targets = sys.argv[6:]
    rows = []
    print(f"{'target':<12} {'executions':>12} {'findings':>9} {'lines of store/':>16}")
    for target in targets:
        found = sorted(glob.glob(f"{build}/found/{target}-*"))
        reached = store_lines(build, target)
        rows.append({"target": target, "executions": executions(build, target), "findings": len(found),
                     "store_lines": share(reached)})
        text = f"{100 * share(reached):.1f}%" if share(reached) is not None else "-"
        print(f"{target:<12} {rows[-1]['executions']:>12,} {len(found):>9} {text:>16}")
        for path in found:
            print(f"    {build}/tests/fuzz/fuzz_{target} {path}")
    total = store_lines(build, "all")
    if total:
        print(f"all targets together reach {total[0]} of {total[1]} lines of store/, {100 * share(total):.1f}%")
    if out:
        result = {
            "command": f"make fuzz TIME={seconds}",
            "seconds": int(seconds),
            "jobs": int(jobs),
            "cpu": cpu(),
            "clang": first_line(clang, "--version"),
            "squeeze": first_line("git", "describe", "--always", "--dirty"),
            "store_lines": share(total),
            "store_lines_by_file": {name: share((lines["covered"], lines["count"]))
                                    for name, lines in sorted(file_lines(build).items())},
            "rows": rows,
        }
        text = json.dumps(result, indent=2) + "\n"
        if out == "-":
            print(text, end="")
        else:
            with open(out, "w") as file:
                file.write(text)
    sys.exit(any(row["findings"] for row in rows))


main()
