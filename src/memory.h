/*
 * Allocation that does not fail: out of memory is handled here and nowhere else. A service that cannot
 * get a few kilobytes can neither store nor log; it says so and aborts, and the broker, which has had
 * no acknowledgement for what was in flight, delivers it again to the next process.
 *
 * Any thread. What these return is freed with free().
 */
#ifndef MQTT2MONGO_MEMORY_H
#define MQTT2MONGO_MEMORY_H

#include <stddef.h>

/* The struct that embeds `member`, from a pointer to the member. */
#define container_of(pointer, type, member) ((type *)(void *)((char *)(pointer)-offsetof(type, member)))

/* `count` zeroed items of `size` bytes. Aborts instead of returning NULL. */
void *memory_zeroed(size_t count, size_t size);

/* As realloc(); aborts instead of returning NULL. The added bytes are not initialised. */
void *memory_resize(void *block, size_t size);

/* `size` bytes, a multiple of `alignment`, for types that ask for more alignment than malloc() gives. */
void *memory_aligned(size_t alignment, size_t size);

/* A copy of `text`, or NULL when `text` is NULL. */
char *memory_string(const char *text);

/* The formatted text, allocated. */
char *memory_format(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Overwrite `size` bytes in a way the compiler keeps, then free. NULL is allowed. For secrets. */
void memory_wipe_free(char *secret);

#endif
