/* The few calls of NVML that dask-cuda makes, for GPUs that are not there; FAKE_GPUS says how many (default 4). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DONE = 0, INVALID = 2, NOT_SUPPORTED = 3, MOST = 16 };
typedef struct { int index; } Device;
static Device devices[MOST];

static int count(void)
{
    const char *said = getenv("FAKE_GPUS");
    return said ? atoi(said) : 4;
}

int nvmlInit_v2(void) { return DONE; }
int nvmlInitWithFlags(unsigned flags) { return DONE; }
int nvmlShutdown(void) { return DONE; }
const char *nvmlErrorString(int code) { return "no real NVML"; }
int nvmlDeviceGetCount_v2(unsigned *found) { *found = count(); return DONE; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device)
{
    if ((int)index >= count() || index >= MOST) return INVALID;
    devices[index].index = index;
    *device = &devices[index];
    return DONE;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device)
{
    int index;
    if (sscanf(uuid, "GPU-%8d", &index) != 1) return INVALID;
    return nvmlDeviceGetHandleByIndex_v2(index, device);
}

int nvmlDeviceGetUUID(Device *device, char *text, unsigned length)
{
    snprintf(text, length, "GPU-%08d-0000-0000-0000-000000000000", device->index);
    return DONE;
}

int nvmlDeviceGetName(Device *device, char *text, unsigned length)
{
    snprintf(text, length, "Not a GPU %d", device->index);
    return DONE;
}

int nvmlDeviceGetIndex(Device *device, unsigned *index) { *index = device->index; return DONE; }

int nvmlDeviceGetMemoryInfo(Device *device, unsigned long long *total_free_used)
{
    total_free_used[0] = total_free_used[1] = 16ull << 30;
    total_free_used[2] = 0;
    return DONE;
}

int nvmlDeviceGetCpuAffinity(Device *device, unsigned words, unsigned long *set)
{
    memset(set, 0, words * sizeof *set);
    set[0] = ~0ul;
    return DONE;
}

int nvmlDeviceGetUtilizationRates(Device *device, unsigned *gpu_memory)
{
    gpu_memory[0] = gpu_memory[1] = 0;
    return DONE;
}

int nvmlDeviceIsMigDeviceHandle(Device *device, unsigned *is) { *is = 0; return DONE; }
int nvmlDeviceGetMigMode(Device *device, unsigned *now, unsigned *later) { return NOT_SUPPORTED; }
int nvmlDeviceGetComputeRunningProcesses_v2(Device *device, unsigned *found, void *list) { *found = 0; return DONE; }
int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *found, void *list) { *found = 0; return DONE; }
