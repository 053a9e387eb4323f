/* The wall clock as documents and messages carry it, and one to measure with. Any thread. */
#ifndef MQTT2MONGO_CLOCK_H
#define MQTT2MONGO_CLOCK_H

#include <stdint.h>
#include <stdio.h>
#include <time.h>
#include <uv.h>

/* Milliseconds since 1970; jumps when the clock is set. */
static inline int64_t clock_wall_ms(void)
{
	uv_timeval64_t now;
	uv_gettimeofday(&now);
	return now.tv_sec * 1000 + now.tv_usec / 1000;
}

/* Milliseconds since some moment in the past; never jumps, never 0. */
static inline int64_t clock_monotonic_ms(void)
{
	return (int64_t)(uv_hrtime() / 1000000) + 1;
}

/* As people and JSON have it: 2026-11-22T20:18:24.123Z. */
static inline void clock_format(int64_t wall_ms, char *text, size_t size)
{
	time_t seconds = (time_t)(wall_ms / 1000);
	struct tm parts = {0};
	gmtime_r(&seconds, &parts);
	size_t length = strftime(text, size, "%Y-%m-%dT%H:%M:%S", &parts);
	snprintf(text + length, size - length, ".%03dZ", (int)(wall_ms % 1000));
}

#endif
