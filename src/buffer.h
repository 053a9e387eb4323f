/*
 * A growable run of bytes with one owner. Grows by doubling, never shrinks by itself, so that a batch that
 * is filled again and again allocates only until it has met its largest load.
 *
 * Offsets into `data` stay valid across growth; pointers do not.
 */
#ifndef MQTT2MONGO_BUFFER_H
#define MQTT2MONGO_BUFFER_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct buffer {
	uint8_t *data;   /* owned; NULL while capacity is 0 */
	size_t length;   /* bytes in use */
	size_t capacity; /* bytes allocated */
};

/* Make room for `more` bytes behind `length`. Aborts when memory runs out. */
void buffer_grow(struct buffer *buffer, size_t more);

/* Free the bytes; the struct is zeroed and may be used again. */
void buffer_finish(struct buffer *buffer);

/* Forget the contents; give memory above `keep` bytes of capacity back. */
void buffer_reset(struct buffer *buffer, size_t keep);

/* Room for `size` ≥ 1 bytes at the end, which now belong to the contents: the caller fills them. */
static inline uint8_t *buffer_extend(struct buffer *buffer, size_t size)
{
	if (buffer->capacity - buffer->length < size)
		buffer_grow(buffer, size);
	uint8_t *place = buffer->data + buffer->length;
	buffer->length += size;
	return place;
}

/* Append a copy of `size` bytes. */
static inline void buffer_append(struct buffer *buffer, const void *bytes, size_t size)
{
	if (size != 0)
		memcpy(buffer_extend(buffer, size), bytes, size);
}

static inline void buffer_append_byte(struct buffer *buffer, uint8_t byte)
{
	*buffer_extend(buffer, 1) = byte;
}

#endif
