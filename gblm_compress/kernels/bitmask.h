/* The kernels of the bitmask layout for few tokens, the paths of the CPU, and torch's threads. See bitmask.c. */
#ifndef GBLM_BITMASK_H
#define GBLM_BITMASK_H

#include "job.h"

/* As many as are asked for, of the OpenMP runtime that was borrowed. */
Threads gblm_threads(int count);

/* y = x Wᵀ of each job, for up to FEW_TOKENS tokens. The jobs differ in mask, values, starts, y and rows alone. */
void gblm_few_tokens(const Job *jobs, int count, const Threads *threads);

EXPORT int gblm_paths(int type);

#endif
