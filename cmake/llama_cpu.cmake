# Read by llama.cpp's own build, right after its project(ggml): scripts/setup.sh passes this file as
# CMAKE_PROJECT_ggml_INCLUDE. So llama.cpp's sources stay as they are.
#
# SQUEEZE_CPU_FLAGS   compiler options for ggml's CPU back end alone, after its own: what set-up takes back from
#                     -march=native when the proof fails with it

# Targets and their sources are there when ggml's folder has been read.
cmake_language(DEFER CALL squeeze_adjust_ggml_cpu)

function(squeeze_adjust_ggml_cpu)
    if(NOT TARGET ggml-cpu)
        return()
    endif()
    target_compile_options(ggml-cpu PRIVATE ${SQUEEZE_CPU_FLAGS})
    # GCC 12 drops the stores that fill the tile configuration, because _tile_loadconfig() does not tell it that they
    # are read; ldtilecfg then faults on what the stack happened to hold.
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
        set_source_files_properties("${CMAKE_CURRENT_SOURCE_DIR}/src/ggml-cpu/amx/mmq.cpp"
            TARGET_DIRECTORY ggml-cpu PROPERTIES COMPILE_OPTIONS "-fno-dse;-fno-tree-dse")
    endif()
endfunction()
