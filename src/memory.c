/* See memory.h: the one place where running out of memory is handled. */
#define _GNU_SOURCE
#include "memory.h"

#include "log.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Noreturn void out_of_memory(size_t size)
{
	/* The log takes no memory. */
	log_error("memory",
	          "out of memory (%zu bytes wanted); nothing unacknowledged is lost, give the service more memory or "
	          "smaller batches",
	          size);
	abort();
}

void *memory_zeroed(size_t count, size_t size)
{
	void *block = calloc(count ? count : 1, size ? size : 1);
	if (block == NULL)
		out_of_memory(count * size);
	return block;
}

void *memory_resize(void *block, size_t size)
{
	void *resized = realloc(block, size ? size : 1);
	if (resized == NULL)
		out_of_memory(size);
	return resized;
}

void *memory_aligned(size_t alignment, size_t size)
{
	void *block = aligned_alloc(alignment, size);
	if (block == NULL)
		out_of_memory(size);
	return block;
}

char *memory_string(const char *text)
{
	if (text == NULL)
		return NULL;
	char *copy = strdup(text);
	if (copy == NULL)
		out_of_memory(strlen(text));
	return copy;
}

char *memory_format(const char *format, ...)
{
	char *text = NULL;
	va_list arguments;
	va_start(arguments, format);
	int length = vasprintf(&text, format, arguments);
	va_end(arguments);
	if (length < 0)
		out_of_memory(strlen(format));
	return text;
}

void memory_wipe_free(char *secret)
{
	if (secret != NULL)
		explicit_bzero(secret, strlen(secret));
	free(secret);
}
