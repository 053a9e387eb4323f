/* See buffer.h. */
#include "buffer.h"

#include "memory.h"

#include <stdlib.h>

enum { SMALLEST = 256 };

void buffer_grow(struct buffer *buffer, size_t more)
{
	size_t wanted = buffer->length + more;
	size_t capacity = buffer->capacity ? buffer->capacity : SMALLEST;
	while (capacity < wanted)
		capacity *= 2;
	buffer->data = memory_resize(buffer->data, capacity);
	buffer->capacity = capacity;
}

void buffer_finish(struct buffer *buffer)
{
	free(buffer->data);
	*buffer = (struct buffer){0};
}

void buffer_reset(struct buffer *buffer, size_t keep)
{
	buffer->length = 0;
	if (buffer->capacity > keep)
		buffer_finish(buffer);
}
