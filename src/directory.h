/*
 * The directories that the service keeps its files in, the state directory and the spool's, and opening those files.
 *
 * A service that runs as root must not be led elsewhere by somebody who is not. So a directory is settled once: made,
 * resolved, and as root refused unless root alone decides what its name leads to and what is in it; that is, it and all
 * directories above it belong to root, and nobody else may write to them. Above it the sticky bit is enough (/tmp), and
 * root's own group is root. For other users nothing is refused: what belongs to whom is then for the administrator to
 * say, and a volume that a whole group may write to is how Kubernetes gives one (fsGroup).
 *
 * Files in it are opened as they are: a symbolic link is never followed, and nothing but a regular file is taken.
 *
 * Any thread.
 */
#ifndef MQTT2MONGO_DIRECTORY_H
#define MQTT2MONGO_DIRECTORY_H

#include <stdbool.h>
#include <stddef.h>

/*
 * The directory's path without symbolic links, allocated, made before where it is missing and `make` says so. NULL with
 * the reason in `error`, which names what is in the way; *refused: it is there, but not for a service that runs as
 * root.
 */
char *directory_settle(const char *path, bool make, bool *refused, char *error, size_t error_size);

/* A settled directory, to open files in and to fsync; -1 with errno, also when it has become a symbolic link. */
int directory_open(const char *path);

/* Open a regular file of ours, 0600 where `flags` make it. A descriptor, or -1 with errno; ELOOP: a symbolic link. */
int directory_open_file(int directory, const char *name, int flags);

/* Make what was done to the directory's entries durable. False with errno. */
bool directory_sync(const char *path);

/* The directory that `path` is in, allocated. */
char *directory_of(const char *path);

#endif
