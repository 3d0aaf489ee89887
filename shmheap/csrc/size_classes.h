/*
 * Size classes of small blocks. Made by tools/gen_size_classes.py, which prints what each class
 * wastes and proves what is said here; do not edit.
 *
 * Pages are of 8192 bytes. A heap with larger pages counts pages and blocks of a span anew; sizes
 * and magics hold for any page of at most 2097152 bytes.
 */
#ifndef SHMHEAP_SIZE_CLASSES_H
#define SHMHEAP_SIZE_CLASSES_H

#include <stdint.h>

#define SH_NCLASSES          80
#define SH_MAX_SMALL         65536 /* bytes; a larger block is a page run */
#define SH_CLASS_PAGE_BYTES  8192  /* the page that npages counts */
#define SH_CLASS_NPAGES_MAX  13    /* longest span of the table */
#define SH_CLASS_NBLOCKS_MAX 512   /* most blocks a span of the table has */

struct sh_class {
    uint32_t size;    /* bytes of a block, a multiple of 16 */
    uint32_t npages;  /* pages of a span */
    uint32_t nblocks; /* blocks of a span */
    uint32_t magic;   /* ceil(2^31 / (size / 16)), see sh_block_index */
};

/* clang-format off */
static const struct sh_class sh_classes[SH_NCLASSES] = {
    {   16,  1, 512, 0x80000000}, /*  0 */
    {   32,  1, 256, 0x40000000}, /*  1 */
    {   48,  1, 170, 0x2aaaaaab}, /*  2 */
    {   64,  1, 128, 0x20000000}, /*  3 */
    {   80,  1, 102, 0x1999999a}, /*  4 */
    {   96,  1,  85, 0x15555556}, /*  5 */
    {  112,  1,  73, 0x12492493}, /*  6 */
    {  128,  1,  64, 0x10000000}, /*  7 */
    {  144,  1,  56, 0x0e38e38f}, /*  8 */
    {  160,  1,  51, 0x0ccccccd}, /*  9 */
    {  176,  1,  46, 0x0ba2e8bb}, /* 10 */
    {  192,  1,  42, 0x0aaaaaab}, /* 11 */
    {  208,  1,  39, 0x09d89d8a}, /* 12 */
    {  224,  1,  36, 0x0924924a}, /* 13 */
    {  240,  1,  34, 0x08888889}, /* 14 */
    {  256,  1,  32, 0x08000000}, /* 15 */
    {  288,  2,  56, 0x071c71c8}, /* 16 */
    {  320,  2,  51, 0x06666667}, /* 17 */
    {  352,  2,  46, 0x05d1745e}, /* 18 */
    {  384,  2,  42, 0x05555556}, /* 19 */
    {  416,  2,  39, 0x04ec4ec5}, /* 20 */
    {  448,  2,  36, 0x04924925}, /* 21 */
    {  480,  2,  34, 0x04444445}, /* 22 */
    {  512,  2,  32, 0x04000000}, /* 23 */
    {  576,  3,  42, 0x038e38e4}, /* 24 */
    {  640,  3,  38, 0x03333334}, /* 25 */
    {  704,  3,  34, 0x02e8ba2f}, /* 26 */
    {  768,  3,  32, 0x02aaaaab}, /* 27 */
    {  832,  4,  39, 0x02762763}, /* 28 */
    {  896,  4,  36, 0x02492493}, /* 29 */
    {  960,  4,  34, 0x02222223}, /* 30 */
    { 1024,  4,  32, 0x02000000}, /* 31 */
    { 1152,  5,  35, 0x01c71c72}, /* 32 */
    { 1280,  5,  32, 0x0199999a}, /* 33 */
    { 1408,  6,  34, 0x01745d18}, /* 34 */
    { 1536,  6,  32, 0x01555556}, /* 35 */
    { 1664,  7,  34, 0x013b13b2}, /* 36 */
    { 1792,  7,  32, 0x0124924a}, /* 37 */
    { 1920,  8,  34, 0x01111112}, /* 38 */
    { 2048,  8,  32, 0x01000000}, /* 39 */
    { 2304,  8,  28, 0x00e38e39}, /* 40 */
    { 2560,  8,  25, 0x00cccccd}, /* 41 */
    { 2816,  8,  23, 0x00ba2e8c}, /* 42 */
    { 3072,  8,  21, 0x00aaaaab}, /* 43 */
    { 3328,  8,  19, 0x009d89d9}, /* 44 */
    { 3584,  8,  18, 0x00924925}, /* 45 */
    { 3840,  8,  17, 0x00888889}, /* 46 */
    { 4096,  8,  16, 0x00800000}, /* 47 */
    { 4608,  8,  14, 0x0071c71d}, /* 48 */
    { 5120,  7,  11, 0x00666667}, /* 49 */
    { 5632,  7,  10, 0x005d1746}, /* 50 */
    { 6144,  7,   9, 0x00555556}, /* 51 */
    { 6656,  6,   7, 0x004ec4ed}, /* 52 */
    { 7168,  8,   9, 0x00492493}, /* 53 */
    { 7680,  8,   8, 0x00444445}, /* 54 */
    { 8192,  8,   8, 0x00400000}, /* 55 */
    { 9216,  8,   7, 0x0038e38f}, /* 56 */
    {10240,  5,   4, 0x00333334}, /* 57 */
    {11264,  7,   5, 0x002e8ba3}, /* 58 */
    {12288,  6,   4, 0x002aaaab}, /* 59 */
    {13312,  5,   3, 0x00276277}, /* 60 */
    {14336,  7,   4, 0x0024924a}, /* 61 */
    {15360,  8,   4, 0x00222223}, /* 62 */
    {16384,  8,   4, 0x00200000}, /* 63 */
    {18432,  9,   4, 0x001c71c8}, /* 64 */
    {20480,  5,   2, 0x0019999a}, /* 65 */
    {22528, 11,   4, 0x001745d2}, /* 66 */
    {24576,  6,   2, 0x00155556}, /* 67 */
    {26624, 10,   3, 0x0013b13c}, /* 68 */
    {28672,  7,   2, 0x00124925}, /* 69 */
    {30720,  8,   2, 0x00111112}, /* 70 */
    {32768,  8,   2, 0x00100000}, /* 71 */
    {36864,  9,   2, 0x000e38e4}, /* 72 */
    {40960,  5,   1, 0x000ccccd}, /* 73 */
    {45056, 11,   2, 0x000ba2e9}, /* 74 */
    {49152,  6,   1, 0x000aaaab}, /* 75 */
    {53248, 13,   2, 0x0009d89e}, /* 76 */
    {57344,  7,   1, 0x00092493}, /* 77 */
    {61440,  8,   1, 0x00088889}, /* 78 */
    {65536,  8,   1, 0x00080000}, /* 79 */
};
/* clang-format on */

/* The smallest class that holds n bytes, 1 <= n <= SH_MAX_SMALL. */
static inline uint32_t sh_class_of(uint32_t n)
{
    uint32_t last = n - 1;
    if (n <= 128)
        return last / 16;
    uint32_t doubling = 31 - (uint32_t)__builtin_clz(last);
    return (doubling - 7) * 8 + (last >> (doubling - 3));
}

/* Which block of its span an offset lies in: offset / size without a division.
 * Exact for every offset below 2097152, whichever byte of the block it is. */
static inline uint32_t sh_block_index(const struct sh_class *c, uint64_t offset)
{
    return (uint32_t)(((offset / 16) * c->magic) >> 31);
}

#endif
