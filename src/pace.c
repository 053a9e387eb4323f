/* See pace.h. */
#include "pace.h"

enum {
	QUIET_MS = 3,     /* so long at least, */
	QUIET_GAPS = 4,   /* and as long as so many messages took to come: then nothing more comes, */
	QUIET_LEAST = 4,  /* which fewer messages tell nothing of */
	TRIAL_MS = 1000,  /* between two waits that only ask whether the window is larger, */
	SHORTS_MOST = 8,  /* waits with fewer messages than there once were; then that was another window */
	TRIAL_SHARE = 50, /* and so many intervals: they take 2 % of the time at most */
};

void pace_connected(struct pace *pace)
{
	*pace = (struct pace){.began = pace->began, .last_at = pace->last_at};
}

void pace_message(struct pace *pace, int qos, uint64_t now)
{
	if (qos == 0) /* in no window */
		return;
	if (pace->unacknowledged == 0)
		pace->first_of = now;
	pace->last_of = now;
	if (++pace->unacknowledged < pace->reached)
		return;
	pace->shorts = 0;
	pace->lately = 0;
	if (pace->unacknowledged == pace->reached)
		return;
	pace->reached = pace->unacknowledged;
	pace->is_window = false;
}

void pace_acknowledged(struct pace *pace)
{
	pace->unacknowledged = 0;
}

/* From then on it is quiet, unless something comes before. */
static uint64_t quiet_from(const struct pace *pace)
{
	return pace->last_of + QUIET_MS + QUIET_GAPS * (pace->last_of - pace->first_of) / pace->unacknowledged;
}

uint64_t pace_due(const struct pace *pace, struct pace_wait wait, uint64_t now)
{
	uint64_t due = pace->began ? pace->last_at + wait.interval : now;
	if (!wait.patient && pace->unacknowledged >= QUIET_LEAST && quiet_from(pace) < due)
		due = quiet_from(pace);
	return due > now ? due : now;
}

/* The broker will send nothing more, as far as we know. */
static bool is_used_up(struct pace *pace, uint64_t now)
{
	if (!pace->is_window || pace->unacknowledged < pace->reached)
		return false;
	if (now >= pace->trial_at)
		pace->is_window = false; /* until a wait has shown it again */
	return pace->is_window;
}

bool pace_is_ready(struct pace *pace, size_t count, struct pace_wait wait, uint64_t now)
{
	return count >= PACE_LARGE || pace_due(pace, wait, now) <= now || is_used_up(pace, now);
}

bool pace_is_fast(const struct pace *pace)
{
	return !pace->is_window && pace->unacknowledged >= QUIET_LEAST &&
	       pace->unacknowledged > pace->last_of - pace->first_of;
}

void pace_waited(struct pace *pace, struct pace_wait wait, uint64_t now)
{
	if (pace->unacknowledged == 0 || now < quiet_from(pace))
		return;
	if (pace->unacknowledged > pace->lately)
		pace->lately = pace->unacknowledged;
	if (pace->unacknowledged < pace->reached) {
		if (++pace->shorts < SHORTS_MOST)
			return;
		pace->reached = pace->lately;
	}
	pace->shorts = 0;
	pace->lately = 0;
	uint64_t pause = TRIAL_SHARE * wait.interval;
	pace->is_window = true;
	pace->trial_at = now + (pause > TRIAL_MS ? pause : TRIAL_MS);
}

void pace_write(struct pace *pace, uint64_t now)
{
	pace->began = true;
	pace->last_at = now;
}
