/*
 * --check and --dry-run: look at broker and database without touching what a running service owns. Both use a throwaway
 * client id and a clean session, so that no session is taken over and none is left behind.
 *
 * Each runs a loop of its own on the calling thread and returns the exit code.
 */
#ifndef MQTT2MONGO_INSPECT_H
#define MQTT2MONGO_INSPECT_H

#include "config.h"

/* Try broker and database once, print what they granted and what the service would do. 0 when both answer, else 1. */
int inspect_check(const struct config *config);

/* Print the documents the consumer would store, as extended JSON, one a line, until SIGINT or SIGTERM. Subscribes at
 * QoS 0, so that there is nothing to acknowledge. 0, or 1 when the broker cannot be used. */
int inspect_dry_run(const struct config *config);

#endif
