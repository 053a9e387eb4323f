/* See directory.h. */
#define _GNU_SOURCE
#include "directory.h"

#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

bool directory_sync(const char *path)
{
	int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	bool synced = fd >= 0 && fsync(fd) == 0;
	int reason = errno;
	if (fd >= 0)
		close(fd);
	errno = reason;
	return synced;
}

/* The directory that `path` is in, allocated. */
static char *parent_of(const char *path)
{
	const char *slash = strrchr(path, '/');
	if (slash == NULL)
		return memory_string(".");
	return memory_format("%.*s", slash == path ? 1 : (int)(slash - path), path);
}

static bool make_one(const char *path, mode_t mode)
{
	if (mkdir(path, mode) != 0)
		return errno == EEXIST;
	char *parent = parent_of(path);
	bool synced = directory_sync(parent) || errno == EACCES; /* it may be written and not read */
	free(parent);
	return synced;
}

bool directory_make(const char *directory)
{
	char *path = memory_string(directory);
	bool made = true;
	for (char *slash = path + 1; made && *slash != 0; slash++) {
		if (*slash != '/')
			continue;
		*slash = 0;
		made = make_one(path, 0755);
		*slash = '/';
	}
	made = made && make_one(path, 0700);
	int reason = errno;
	free(path);
	errno = reason;
	return made;
}
