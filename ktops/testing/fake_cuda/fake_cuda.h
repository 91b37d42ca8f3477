#pragma once

// The functions of fake_cuda.cpp that are not CUDA's own, and those of CUDA that only tests call.

#include <cstddef>
#include <cstdint>

extern "C" {

// Every operation is executed after a random delay of up to so many microseconds; 0 for none.
void fake_set_delays(unsigned seed, unsigned microseconds);
// 1: host functions of different streams exclude each other, as CUDA allows.
void fake_serialize_host_functions(int serialize);
// The next call of this function, "cudaMemcpyAsync", fails with this status.
void fake_fail(const char* function, int status);
// The number of calls of a function so far.
int64_t fake_calls(const char* function);
// Bytes of pinned memory.
int64_t fake_pinned_bytes();
// Enqueues an operation that blocks the stream until fake_unblock() is called.
void fake_block(void* stream);
void fake_unblock(void* stream);
// Returns once all objects that belonged to destroyed graphs are destroyed, too.
void fake_wait_for_destructors();
// 1 while the stream is captured.
int fake_is_captured(void* stream);
// Has everything that is enqueued executed when the process exits. CUDA may do so.
void fake_drain_at_exit();

int cudaSetDevice(int device);
int cudaGetDevice(int* device);
int cudaStreamCreate(void** stream);
int cudaStreamSynchronize(void* stream);
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream);
int cudaEventCreate(void** event);
int cudaEventCreateWithFlags(void** event, unsigned flags);
int cudaEventDestroy(void* event);
int cudaEventRecord(void* event, void* stream);
int cudaStreamWaitEvent(void* stream, void* event, unsigned flags);
int cudaStreamBeginCapture(void* stream, int mode);
int cudaStreamEndCapture(void* stream, void** graph);
int cudaGraphInstantiate(void** exec, void* graph, uint64_t flags);
int cudaGraphLaunch(void* exec, void* stream);
int cudaGraphDestroy(void* graph);
int cudaGraphExecDestroy(void* exec);

}  // extern "C"
