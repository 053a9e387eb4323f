/*
 * What http.listen says about the state of the service, beside the figures: is it ready, and if not, why. Pure: all it
 * knows is handed to it.
 */
#ifndef MQTT2MONGO_HEALTH_H
#define MQTT2MONGO_HEALTH_H

#include "metrics.h"

#include <stdbool.h>

struct health {
	struct metrics_view view;
	const char *consumer_status, *publisher_status; /* "consuming", …; NULL: does not run */
	bool stopping;                                  /* the whole service */
	bool consumer_stopping, publisher_stopping;
};

/*
 * {"ready":true,"reasons":[…]}: what runs does its work. A reason beside true is a warning. The consumer is ready when
 * all its connections are subscribed and messages can be stored, in MongoDB or in the spool; the publisher when it is
 * connected. Allocated.
 */
char *health_readiness(const struct health *health, bool *ready);

/* All of it as one JSON object: version, readiness, parts, connections, database, spool, broker, sums. Allocated. */
char *health_status(const struct health *health);

#endif
