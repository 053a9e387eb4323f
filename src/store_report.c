/* See store_report.h. */
#include "store_report.h"

#include "mongodb_error.h"

#include <stdio.h>

void store_report_error(struct store_report *report, const bson_error_t *error, const char *what,
                        const char *collection)
{
	enum store_class class =
	    mongodb_is_configuration(error->domain, (int)error->code) ? STORE_CONFIGURATION : STORE_TRANSIENT;
	if (class < report->class)
		return;
	report->class = class;
	snprintf(report->message, sizeof report->message, "%s: %.*s (%u)%s%s%s",
	         mongodb_error_title(error->domain, what), mongodb_message_length(error->message), error->message,
	         (unsigned)error->code, collection != NULL ? " in the collection " : "",
	         collection != NULL ? collection : "", mongodb_remedy(error->domain, (int)error->code));
}
