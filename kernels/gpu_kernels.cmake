# Compiles the Triton kernels ahead of time into a table of C; sets `table`.

# The README's virtual environment, where one is neither active nor named by -DPython3_EXECUTABLE.
set(venv_python "${CMAKE_SOURCE_DIR}/.venv/bin/python")
if(NOT DEFINED Python3_EXECUTABLE AND NOT DEFINED ENV{VIRTUAL_ENV} AND EXISTS "${venv_python}")
  set(Python3_EXECUTABLE "${venv_python}")
endif()
find_package(Python3 COMPONENTS Interpreter)

# The operations of the C library, forward.
set(c_library_kernels
  "^(project_splice|(add_)?rms_norm_inference|rope(_decode)?|swiglu_forward)_bf16|^(paged_attention|store_kv)")

set(aot ${CMAKE_COMMAND} -E env --unset=TRITON_INTERPRET "PYTHONPATH=${CMAKE_CURRENT_SOURCE_DIR}" "${Python3_EXECUTABLE}")
if(Python3_FOUND)
  execute_process(
    COMMAND ${aot} -c "import torch, triton; print(triton.__version__)"
    RESULT_VARIABLE failed OUTPUT_VARIABLE triton_version ERROR_VARIABLE words OUTPUT_STRIP_TRAILING_WHITESPACE)
else()
  set(failed TRUE)
  set(words "there is no python3")
endif()

if(failed)
  string(STRIP "${words}" words)
  string(REGEX REPLACE ".*\n" "" words "${words}")
  message(WARNING
    "libllava_kernels is built without GPU kernels: Python with torch and triton is needed to compile them, and "
    "${Python3_EXECUTABLE} says: ${words}. Name another with -DPython3_EXECUTABLE=...")
  set(table csrc/no_kernels.c)
else()
  message(STATUS "GPU kernels: compiled by Triton ${triton_version} of ${Python3_EXECUTABLE}")
  set(table "${CMAKE_CURRENT_BINARY_DIR}/cubins/kernels.c")
  file(GLOB_RECURSE kernel_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/llava_kernels/*.py")
  add_custom_command(
    OUTPUT "${table}"
    COMMAND ${aot} -m llava_kernels.aot --out "${CMAKE_CURRENT_BINARY_DIR}/cubins" --only "${c_library_kernels}"
    DEPENDS ${kernel_sources}
    COMMENT "Compiling the kernels for sm_80 and sm_90 (a minute or two)"
    VERBATIM)
endif()
