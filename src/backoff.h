/* Waiting longer with every failure in a row. Pure. */
#ifndef MQTT2MONGO_BACKOFF_H
#define MQTT2MONGO_BACKOFF_H

#include <stdint.h>

/* `first` after the first failure, doubling with each further one, `most` in the end. Milliseconds. */
static inline uint64_t backoff_ms(unsigned failures, uint64_t first, uint64_t most)
{
	uint64_t delay = first;
	for (unsigned i = 1; i < failures && delay < most; i++)
		delay *= 2;
	return delay < most ? delay : most;
}

#endif
