/* What the kernels of quantised weights are given. See quantised.c.
 *
 * Masks and starts are as job.h says, but starts count bytes. Levels are within -127 … 127. `values` is readable for 64
 * bytes past the last; rows are at most MOST_WORDS words, lest an integer overflows. All of it is the caller's to guarantee.
 */
#ifndef GBLM_QUANTISED_H
#define GBLM_QUANTISED_H

#include "job.h"

enum { MOST_WORDS = 1024 };

/* How x in 16 bits is written: as int16, or for each word 64 high bytes and then 64 low ones, of q + 32768 or of q - 128. */
enum { WHOLE, UNSIGNED_BYTES, SIGNED_BYTES };

typedef struct {
    const uint64_t *mask; /* NULL: rows × words·64 levels, or with `levels` what gblm_spread wrote */
    const uint8_t *values;
    const int64_t *starts; /* the byte where a row begins; NULL without a mask */
    const int8_t *levels;  /* 16 for all rows or for each; NULL: values are levels */
    const uint16_t *scales;
    const float *sums;     /* of a row: Σ scale · level, or Σ level where the row has one scale */
    const void *x;         /* rounded: tokens × words × 64 in `form`; or for many tokens a `Block` each */
    const float *x_scales;
    void *y;
    int64_t rows, words, tokens, columns, groups, stride; /* stride: from row to row in levels */
    int group, type, path; /* group: 0 for a row; type: of x and y */
    int exact;             /* x has 16 bits for many tokens too */
    int form;
} Quantised;

/* y = x Wᵀ of each job, for any number of tokens. The jobs differ in the weight, y and rows alone; x is rounded for all of
 * them at once.
 *
 * inputs: x as it comes, tokens × columns of `type`. rounded: gblm_quantised_bytes of scratch. */
void gblm_quantised_run(Quantised *jobs, int count, const void *inputs, void *rounded, const Threads *threads);

/* Whether levels or places are multiplied faster once they are spread over all columns. Levels then take 64 bytes for 64 columns
 * instead of 40, and places 40 instead of 24: with many processors reading is the limit. */
EXPORT int gblm_spreads(int path, int processors, int places);

/* Write the weight, so many bytes, and with places also so many scales, for kernels of the job's path: they take them as `values`
 * and `scales`, without mask and starts. Spread places are multiplied by x of 8 bits for any number of tokens. They need one table
 * for all rows. */
void gblm_spread(const Quantised *job, uint8_t *to, uint16_t *scales);
int64_t gblm_spread_bytes(const Quantised *job);
int64_t gblm_spread_scales(const Quantised *job);

EXPORT int64_t gblm_quantised_bytes(int64_t words, int64_t tokens);
EXPORT int gblm_quantised_paths(void); /* bit p is set where the CPU can run path p */

#endif
