// A stand-in for libcuda.so.1 with one function: cuLaunchKernelEx writes down what it was given, as the real cuda.h has it.
#include <cuda.h>
#include <stddef.h>
#include <string.h>

#define SIZE_AND_OFFSET(type, field) sizeof(((type *)0)->field), offsetof(type, field)

const size_t config_layout[] = {
    sizeof(CUlaunchConfig), SIZE_AND_OFFSET(CUlaunchConfig, sharedMemBytes), SIZE_AND_OFFSET(CUlaunchConfig, hStream),
    SIZE_AND_OFFSET(CUlaunchConfig, attrs), SIZE_AND_OFFSET(CUlaunchConfig, numAttrs)};
const size_t attribute_layout[] = {
    sizeof(CUlaunchAttribute), SIZE_AND_OFFSET(CUlaunchAttribute, id), SIZE_AND_OFFSET(CUlaunchAttribute, value)};
const int programmatic_stream_serialization = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;

// Set before a launch: the sizes of the kernel's parameters, and what the launch returns.
size_t parameter_sizes[32];
int num_parameters, result;

// Seen by the last launch.
int num_launches;
unsigned grid[3], block[3], shared_bytes, num_attributes, attribute_id;
int is_programmatic;
unsigned long long stream, function, extra;
unsigned char parameters[32][16];

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **values, void **more) {
  num_launches++;
  grid[0] = config->gridDimX, grid[1] = config->gridDimY, grid[2] = config->gridDimZ;
  block[0] = config->blockDimX, block[1] = config->blockDimY, block[2] = config->blockDimZ;
  shared_bytes = config->sharedMemBytes;
  stream = (unsigned long long)config->hStream;
  function = (unsigned long long)f, extra = (unsigned long long)more;
  num_attributes = config->numAttrs;
  if (num_attributes) {
    attribute_id = config->attrs[0].id;
    is_programmatic = config->attrs[0].value.programmaticStreamSerializationAllowed;
  }
  for (int i = 0; i < num_parameters; i++) memcpy(parameters[i], values[i], parameter_sizes[i]);
  return (CUresult)result;
}
