# Toolchain file for 64-bit ARM Linux: Debian's cross compiler (gcc-aarch64-linux-gnu), test programs under its
# emulator (qemu-user).
#
#   cmake -S . -B build/arm64 -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake -DSQUEEZE_ENGINE=OFF
#
# The tests need cmocka for 64-bit ARM. tests/check_arm.sh says by pkg-config's environment variables where
# scripts/setup.sh has unpacked it.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)

set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
if(DEFINED ENV{PKG_CONFIG_SYSROOT_DIR})
    list(APPEND CMAKE_FIND_ROOT_PATH "$ENV{PKG_CONFIG_SYSROOT_DIR}")
endif()
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)

find_program(SQUEEZE_EMULATOR NAMES qemu-aarch64 qemu-aarch64-static)
mark_as_advanced(SQUEEZE_EMULATOR)
if(SQUEEZE_EMULATOR)
    set(CMAKE_CROSSCOMPILING_EMULATOR "${SQUEEZE_EMULATOR}" -L /usr/aarch64-linux-gnu)
endif()
