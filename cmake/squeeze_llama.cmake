# Finds llama.cpp and wraps it as the target squeeze_llama.
#
# SQUEEZE_LLAMA  auto       an installed one, when new enough and right on this CPU (cmake/llama_probe says), else the
#                           pinned one (default)
#                installed  find_package(llama) only
#                pinned     the one that scripts/setup.sh built into the per-user cache only
#
# Sets SQUEEZE_LLAMA_ARCHIVES: the static libraries to install beside ours, in link order; empty when llama.cpp is
# shared or has other back ends than the CPU, and then whoever links our static library finds llama.cpp itself.
# Sets SQUEEZE_LLAMA_PROOF: what scripts/setup.sh proved about it on this CPU; empty for an installed one.

# Builds for fuzzing and for ThreadSanitizer are by clang, whatever compiler llama.cpp was built with: they take the
# archives as they are. A fuzzing build is without OpenMP; the other's is clang's, which has the entry points that gcc's
# code calls.
if(SQUEEZE_FUZZ OR SQUEEZE_TSAN)
    execute_process(
        COMMAND "${CMAKE_COMMAND}" -E env --unset=CC --unset=CXX "${PROJECT_SOURCE_DIR}/scripts/setup.sh" --where llama
        OUTPUT_VARIABLE prefix OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(NOT EXISTS "${prefix}/lib/libllama.a")
        message(FATAL_ERROR "no llama.cpp in ${prefix}; run scripts/setup.sh")
    endif()
    add_library(squeeze_llama INTERFACE)
    target_include_directories(squeeze_llama SYSTEM INTERFACE "${prefix}/include")
    foreach(archive IN ITEMS llama ggml ggml-cpu ggml-base)
        target_link_libraries(squeeze_llama INTERFACE "${prefix}/lib/lib${archive}.a")
    endforeach()
    if(SQUEEZE_FUZZ)
        target_link_libraries(squeeze_llama INTERFACE gomp)
    endif()
    target_link_libraries(squeeze_llama INTERFACE pthread dl)
    set(SQUEEZE_LLAMA_ARCHIVES "")
    set(SQUEEZE_LLAMA_PROOF "")
    set(SQUEEZE_GGML_INTERNAL "")
    return()
endif()

set(SQUEEZE_LLAMA auto CACHE STRING "auto, installed or pinned")
set_property(CACHE SQUEEZE_LLAMA PROPERTY STRINGS auto installed pinned)
if(NOT SQUEEZE_LLAMA MATCHES "^(auto|installed|pinned)$")
    message(FATAL_ERROR "SQUEEZE_LLAMA is '${SQUEEZE_LLAMA}'; allowed: auto, installed, pinned")
endif()

set(SQUEEZE_LLAMA_PROOF "")
set(llama_found "")
set(llama_refused "")

if(NOT SQUEEZE_LLAMA STREQUAL "pinned")
    set(probe "${CMAKE_BINARY_DIR}/llama_probe")
    file(REMOVE "${probe}/answer.txt")
    set(arguments "")
    foreach(variable IN ITEMS CMAKE_C_COMPILER CMAKE_CXX_COMPILER CMAKE_PREFIX_PATH CMAKE_TOOLCHAIN_FILE llama_ROOT)
        if(${variable})
            list(APPEND arguments "-D${variable}=${${variable}}")
        endif()
    endforeach()
    execute_process(
        COMMAND "${CMAKE_COMMAND}" -G "${CMAKE_GENERATOR}" -S "${CMAKE_CURRENT_LIST_DIR}/llama_probe" -B "${probe}"
                ${arguments}
        OUTPUT_QUIET ERROR_QUIET)
    set(answer "no")
    if(EXISTS "${probe}/answer.txt")
        file(STRINGS "${probe}/answer.txt" answer LIMIT_COUNT 1)
    endif()
    if(answer MATCHES "^no: (.*)")
        set(llama_refused " (${CMAKE_MATCH_1})")
    elseif(NOT answer STREQUAL "no")
        set(llama_found "installed")
        set(llama_config "${answer}")
    endif()
endif()

if(NOT llama_found AND NOT SQUEEZE_LLAMA STREQUAL "installed")
    # setup.sh alone knows the cache's layout; asked this way it only prints a path.
    execute_process(
        COMMAND "${CMAKE_COMMAND}" -E env "CC=${CMAKE_C_COMPILER}" "CXX=${CMAKE_CXX_COMPILER}"
                "${PROJECT_SOURCE_DIR}/scripts/setup.sh" --where llama
        OUTPUT_VARIABLE prefix OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
    if(NOT failed AND EXISTS "${prefix}/lib/cmake/llama/llama-config.cmake")
        set(llama_found "pinned")
        set(llama_config "${prefix}/lib/cmake/llama")
        set(SQUEEZE_LLAMA_PROOF "${prefix}/proof.txt")
    endif()
endif()

if(NOT llama_found)
    message(FATAL_ERROR "no llama.cpp that squeeze can use${llama_refused}; run scripts/setup.sh to build the pinned "
        "one with this compiler (${CMAKE_C_COMPILER}), or set SQUEEZE_ENGINE=OFF to build the library without it")
endif()

# ggml's configuration has no hint in llama's own when another ggml is installed as well.
get_filename_component(ggml_config "${llama_config}/../ggml" ABSOLUTE)
if(EXISTS "${ggml_config}/ggml-config.cmake")
    set(ggml_DIR "${ggml_config}" CACHE PATH "Folder of ggml-config.cmake" FORCE)
endif()
set(llama_DIR "${llama_config}" CACHE PATH "Folder of llama-config.cmake" FORCE)
unset(llama_LIBRARY CACHE)
find_package(llama CONFIG REQUIRED QUIET)
message(STATUS "llama.cpp: ${llama_found}, ${llama_config}${llama_refused}")

add_library(squeeze_llama INTERFACE)
target_link_libraries(squeeze_llama INTERFACE llama)

set(SQUEEZE_LLAMA_ARCHIVES "")
if(NOT LLAMA_SHARED_LIB AND NOT GGML_SHARED_LIB AND NOT GGML_BLAS AND NOT GGML_CPU_KLEIDIAI AND NOT GGML_CPU_HBM
        AND GGML_AVAILABLE_BACKENDS STREQUAL "ggml-cpu")
    foreach(archive IN ITEMS llama ggml::ggml ggml::ggml-cpu ggml::ggml-base)
        get_target_property(location ${archive} IMPORTED_LOCATION)
        list(APPEND SQUEEZE_LLAMA_ARCHIVES "${location}")
    endforeach()
endif()
# Folder of ggml's own headers, which a device of ours is compiled by; empty for a llama.cpp that does not have them.
set(SQUEEZE_GGML_INTERNAL "")
if(llama_found STREQUAL "pinned" AND EXISTS "${prefix}/include/ggml-internal/ggml-backend-impl.h")
    set(SQUEEZE_GGML_INTERNAL "${prefix}/include/ggml-internal")
endif()

# ggml's CUDA back end, where scripts/setup.sh has built it: beside the program, which loads it when it runs.
set(SQUEEZE_GGML_CUDA "")
if(SQUEEZE_GGML_INTERNAL AND SQUEEZE_CUDA)
    execute_process(
        COMMAND "${CMAKE_COMMAND}" -E env "CC=${CMAKE_C_COMPILER}" "CXX=${CMAKE_CXX_COMPILER}"
                "${PROJECT_SOURCE_DIR}/scripts/setup.sh" --where ggml-cuda
        OUTPUT_VARIABLE module OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed ERROR_QUIET)
    if(NOT failed AND EXISTS "${module}")
        set(SQUEEZE_GGML_CUDA "${module}")
        file(CREATE_LINK "${module}" "${CMAKE_BINARY_DIR}/libggml-cuda.so" SYMBOLIC)
    endif()
    message(STATUS "ggml for CUDA: ${SQUEEZE_GGML_CUDA}")
endif()
if(NOT GGML_OPENMP_ENABLED)
    message(WARNING "this llama.cpp was built without OpenMP: its threads and ours will compete for the cores")
endif()
