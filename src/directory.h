/*
 * The directories that the service keeps its files in: the state directory and the spool's.
 *
 * Any thread.
 */
#ifndef MQTT2MONGO_DIRECTORY_H
#define MQTT2MONGO_DIRECTORY_H

#include <stdbool.h>

/* Make the directory and those above it, where they are missing, durably. False with errno. */
bool directory_make(const char *path);

/* Make what was done to the directory's entries durable. False with errno. */
bool directory_sync(const char *path);

#endif
