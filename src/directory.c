/* See directory.h. */
#define _GNU_SOURCE
#include "directory.h"

#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

char *directory_of(const char *path)
{
	const char *slash = strrchr(path, '/');
	if (slash == NULL)
		return memory_string(".");
	return memory_format("%.*s", slash == path ? 1 : (int)(slash - path), path);
}

int directory_open(const char *path)
{
	return open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

static void close_keeping_errno(int fd)
{
	int reason = errno;
	if (fd >= 0)
		close(fd);
	errno = reason;
}

bool directory_sync(const char *path)
{
	int fd = directory_open(path);
	bool synced = fd >= 0 && fsync(fd) == 0;
	close_keeping_errno(fd);
	return synced;
}

int directory_open_file(int directory, const char *name, int flags)
{
	struct stat status;
	/* Without O_NONBLOCK a FIFO in its place would stop us. */
	int fd = openat(directory, name, flags | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
	if (fd < 0 || (fstat(fd, &status) == 0 && S_ISREG(status.st_mode)))
		return fd;
	close(fd);
	errno = S_ISDIR(status.st_mode) ? EISDIR : EINVAL;
	return -1;
}

/* ---- making ---- */

static bool make_one(const char *path, mode_t mode)
{
	if (mkdir(path, mode) != 0)
		return errno == EEXIST;
	char *parent = directory_of(path);
	int fd = open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	bool synced = fd < 0 ? errno == EACCES : fsync(fd) == 0; /* it may be written and not read */
	close_keeping_errno(fd);
	free(parent);
	return synced;
}

static bool make_all(const char *directory)
{
	char *path = memory_string(directory);
	bool made = true;
	for (char *slash = path + 1; made && *path != 0 && *slash != 0; slash++) {
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

/* ---- whether others decide ---- */

/* Whether somebody else than root decides what is at `path`, be it a link. Nobody does what is not there. */
static bool is_others(const char *path, bool itself, char *error, size_t error_size)
{
	struct stat link, status;
	if (lstat(path, &link) != 0 || stat(path, &status) != 0)
		return false;
	uid_t owner = link.st_uid != 0 ? link.st_uid : status.st_uid;
	if (owner != 0) {
		snprintf(error, error_size,
		         "%s belongs to another user (%u), who could have root overwrite any file: run mqtt2mongo as "
		         "that user, or give it to root",
		         path, (unsigned)owner);
		return true;
	}
	bool writable = (status.st_mode & S_IWOTH) || ((status.st_mode & S_IWGRP) && status.st_gid != 0);
	if (!writable || ((status.st_mode & S_ISVTX) && !itself))
		return false;
	snprintf(error, error_size,
	         "others may write to %s (mode %04o) and could have root overwrite any file: chmod go-w it, or run "
	         "mqtt2mongo as another user than root",
	         path, (unsigned)status.st_mode & 07777);
	return true;
}

/* The same of the directory or any above it. */
static bool is_led_by_others(const char *directory, char *error, size_t error_size)
{
	char *path = memory_string(directory);
	bool others = path[0] == '/' && is_others("/", path[1] == 0, error, error_size);
	for (char *slash = path; !others && *slash != 0; slash++) {
		if (slash == path || *slash != '/')
			continue;
		*slash = 0;
		others = is_others(path, slash[1] == 0, error, error_size);
		*slash = '/';
	}
	others = others || is_others(path, true, error, error_size);
	free(path);
	return others;
}

char *directory_settle(const char *path, bool make, bool *refused, char *error, size_t error_size)
{
	struct stat status;
	bool root = geteuid() == 0;
	/* Before anything is made there, and, for what the links lead through, afterwards. */
	*refused = root && is_led_by_others(path, error, error_size);
	if (*refused)
		return NULL;
	bool made = !make || make_all(path);
	char *resolved = made ? realpath(path, NULL) : NULL;
	if (resolved != NULL && stat(resolved, &status) == 0 && !S_ISDIR(status.st_mode)) {
		free(resolved);
		resolved = NULL;
		errno = ENOTDIR;
	}
	if (resolved == NULL) {
		snprintf(error, error_size, "%s", strerror(errno));
		return NULL;
	}
	*refused = root && is_led_by_others(resolved, error, error_size);
	if (!*refused)
		return resolved;
	free(resolved);
	return NULL;
}
