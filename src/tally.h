/*
 * Which numbers of 0 … count - 1 have been seen, and how often beyond once: a bit for each number. Above TALLY_MOST
 * numbers there is no memory for bits: then it only counts, takes the first `count` for distinct, and cannot name what
 * is missing. Pure; one owner.
 */
#ifndef MQTT2MONGO_TALLY_H
#define MQTT2MONGO_TALLY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { TALLY_MOST = 100000000 }; /* 12.5 MB of bits */

struct tally {
	uint64_t count;
	uint64_t marks;    /* numbers given to tally_mark(), those outside the range left out */
	uint64_t distinct; /* different ones among them */
	uint8_t *seen;     /* owned; NULL when it only counts */
};

void tally_init(struct tally *tally, uint64_t count);
void tally_finish(struct tally *tally);

/* `number` was seen. Outside the range it does not count. */
void tally_mark(struct tally *tally, int64_t number);

/* Write the first `most` numbers that have not been seen to `missing`; how many they are. 0 when it only counts. */
size_t tally_missing(const struct tally *tally, uint64_t *missing, size_t most);

#endif
