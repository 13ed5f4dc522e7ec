# What `cmake --install` puts where, and how others find it: pkg-config and find_package(squeeze), both relocatable.
#
# The shared library holds llama.cpp inside. For the static one, llama.cpp's archives are installed in a folder of
# our own beside it, <libdir>/squeeze/, so that an installation is complete in itself and no other llama.cpp on the
# machine is touched or mistaken for it. Where llama.cpp was found installed as a shared library it stays a dependency.

set(archive_dir "${CMAKE_INSTALL_LIBDIR}/squeeze")
set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/squeeze")

install(TARGETS ${libraries} EXPORT squeeze-targets
    ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}"
    LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(FILES include/squeeze.h include/squeeze_attention.h include/squeeze_roofline.h DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
if(SQUEEZE_CUDA)
    install(FILES include/squeeze_cuda.h DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
    if(SQUEEZE_GGML_CUDA)
        install(PROGRAMS "${SQUEEZE_GGML_CUDA}" DESTINATION "${CMAKE_INSTALL_LIBDIR}/squeeze")
    endif()
endif()
install(FILES LICENSE DESTINATION "${CMAKE_INSTALL_DOCDIR}")
if(TARGET squeeze_program)
    install(TARGETS squeeze_program RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
    install(FILES ${MAN_PAGES} DESTINATION "${CMAKE_INSTALL_MANDIR}/man1")
    install(FILES share/completion/squeeze.bash RENAME squeeze
        DESTINATION "${CMAKE_INSTALL_DATADIR}/bash-completion/completions")
    install(FILES share/completion/_squeeze DESTINATION "${CMAKE_INSTALL_DATADIR}/zsh/site-functions")
    install(FILES share/completion/squeeze.fish DESTINATION "${CMAKE_INSTALL_DATADIR}/fish/vendor_completions.d")
endif()

# ---- What the static library needs beside it -------------------------------------

set(private_names "")     # -l names, in link order
set(private_archives "")  # file names in archive_dir, in link order
set(SQUEEZE_NEEDS_LLAMA OFF)
set(SQUEEZE_PC_REQUIRES_PRIVATE "")
if(SQUEEZE_ENGINE)
    if(SQUEEZE_LLAMA_ARCHIVES)
        install(FILES ${SQUEEZE_LLAMA_ARCHIVES} DESTINATION "${archive_dir}")
        foreach(archive IN LISTS SQUEEZE_LLAMA_ARCHIVES)
            get_filename_component(name "${archive}" NAME)
            list(APPEND private_archives "${name}")
        endforeach()
        if(EXISTS "${llama_DIR}/../../../LICENSE")
            install(FILES "${llama_DIR}/../../../LICENSE" DESTINATION "${CMAKE_INSTALL_DOCDIR}" RENAME LICENSE.llama.cpp)
        endif()
    else()
        set(SQUEEZE_NEEDS_LLAMA ON)
        set(SQUEEZE_PC_REQUIRES_PRIVATE "llama")
    endif()
    if("c++" IN_LIST CMAKE_CXX_IMPLICIT_LINK_LIBRARIES)
        list(APPEND private_names c++)
    else()
        list(APPEND private_names stdc++)
    endif()
    list(APPEND private_names pthread ${CMAKE_DL_LIBS})
endif()
if(MATH_LIBRARY)
    list(APPEND private_names m)
endif()

set(SQUEEZE_PC_LIBS_PRIVATE "")
if(private_archives)
    string(APPEND SQUEEZE_PC_LIBS_PRIVATE " -L\${libdir}/squeeze")
    foreach(name IN LISTS private_archives)
        string(APPEND SQUEEZE_PC_LIBS_PRIVATE " -l:${name}")
    endforeach()
endif()
if(OpenMP_C_FOUND)
    string(APPEND SQUEEZE_PC_LIBS_PRIVATE " ${OpenMP_C_FLAGS}")
endif()
foreach(name IN LISTS private_names)
    string(APPEND SQUEEZE_PC_LIBS_PRIVATE " -l${name}")
endforeach()

# ---- pkg-config --------------------------------------------------------------------

file(RELATIVE_PATH SQUEEZE_PC_PREFIX
    "${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig" "${CMAKE_INSTALL_PREFIX}")
configure_file(cmake/squeeze.pc.in squeeze.pc @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/squeeze.pc" DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig")

# ---- find_package(squeeze) -----------------------------------------------------------

set(SQUEEZE_PRIVATE_ARCHIVES "${private_archives}")
set(SQUEEZE_PRIVATE_NAMES "${private_names}")
configure_package_config_file(cmake/squeeze-config.cmake.in squeeze-config.cmake
    INSTALL_DESTINATION "${package_dir}" PATH_VARS archive_dir NO_CHECK_REQUIRED_COMPONENTS_MACRO)
# Before 1.0 a minor release may change the interface.
if(PROJECT_VERSION_MAJOR EQUAL 0)
    set(compatibility SameMinorVersion)
else()
    set(compatibility SameMajorVersion)
endif()
write_basic_package_version_file("${PROJECT_BINARY_DIR}/squeeze-config-version.cmake" COMPATIBILITY ${compatibility})
install(FILES "${PROJECT_BINARY_DIR}/squeeze-config.cmake" "${PROJECT_BINARY_DIR}/squeeze-config-version.cmake"
    DESTINATION "${package_dir}")
install(EXPORT squeeze-targets NAMESPACE squeeze:: DESTINATION "${package_dir}")
