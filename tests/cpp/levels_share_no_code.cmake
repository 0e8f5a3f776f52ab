# The same kernels are compiled for several instruction sets. An inline function or template that
# two of these files emit under one name is merged by the linker, and the copy it keeps may hold
# instructions that the running CPU lacks. So the files of the higher levels must define no weak
# symbol: all their code has internal linkage or is inlined.
execute_process(
  COMMAND ${NM} --demangle --defined-only --print-file-name ${LIBRARY}
  OUTPUT_VARIABLE symbols
  COMMAND_ERROR_IS_FATAL ANY)
if(NOT symbols MATCHES "level_avx512")
  return() # not x86-64
endif()
string(REGEX MATCHALL "level_avx[^\n]*: ?[0-9a-f]* [WVu] [^\n]*" shared "${symbols}")
if(shared)
  list(JOIN shared "\n  " shared)
  message(FATAL_ERROR "compiled for one level, but visible to all:\n  ${shared}")
endif()
