/*
 * LD_PRELOAD for the fault tests: while the file FAULT_FSYNC_CONTROL exists, fsync() and fdatasync() fail with EIO for
 * every file whose path contains FAULT_FSYNC_MATCH. Nothing is synced then. Each failure appends the path as a line to
 * FAULT_FSYNC_LOG: the proof that the fault happened.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool fails(int descriptor)
{
	const char *control = getenv("FAULT_FSYNC_CONTROL"), *match = getenv("FAULT_FSYNC_MATCH");
	const char *log = getenv("FAULT_FSYNC_LOG");
	char link[64], path[4096];

	if (control == NULL || match == NULL || access(control, F_OK) != 0)
		return false;
	snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
	ssize_t length = readlink(link, path, sizeof path - 2);
	if (length < 0)
		return false;
	path[length] = '\0';
	if (strstr(path, match) == NULL)
		return false;

	int file = log != NULL ? open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
	if (file >= 0) {
		path[length] = '\n';
		if (write(file, path, (size_t)length + 1) < 0)
			perror(log);
		close(file);
	}
	return true;
}

static int sync_or_fail(const char *name, int descriptor)
{
	union { /* ISO C knows no cast from an object's pointer to a function's */
		void *object;
		int (*function)(int);
	} real = {.object = dlsym(RTLD_NEXT, name)};

	if (fails(descriptor)) {
		errno = EIO;
		return -1;
	}
	return real.function(descriptor);
}

int fsync(int fd);
int fsync(int fd)
{
	return sync_or_fail("fsync", fd);
}

int fdatasync(int fildes);
int fdatasync(int fildes)
{
	return sync_or_fail("fdatasync", fildes);
}
