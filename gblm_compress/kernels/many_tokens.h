/* The kernels of the bitmask layout for many tokens. See many_tokens.c. */
#ifndef GBLM_MANY_TOKENS_H
#define GBLM_MANY_TOKENS_H

#include "job.h"

/* As gblm_few_tokens for any number of tokens, where gblm_has_many(type, path). */
void gblm_many_tokens(const Job *jobs, int count, const Threads *threads);

EXPORT int gblm_has_many(int type, int path);
EXPORT int64_t gblm_panel_bytes(int64_t words, int64_t tokens, int type);

#endif
