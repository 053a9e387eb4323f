/* The wall clock as documents and messages carry it. Any thread. */
#ifndef MQTT2MONGO_CLOCK_H
#define MQTT2MONGO_CLOCK_H

#include <stdint.h>
#include <uv.h>

/* Milliseconds since 1970; jumps when the clock is set. */
static inline int64_t clock_wall_ms(void)
{
	uv_timeval64_t now;
	uv_gettimeofday(&now);
	return now.tv_sec * 1000 + now.tv_usec / 1000;
}

#endif
