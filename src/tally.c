/* See tally.h. */
#include "tally.h"

#include "memory.h"

#include <stdlib.h>

void tally_init(struct tally *tally, uint64_t count)
{
	*tally = (struct tally){.count = count};
	if (count <= TALLY_MOST)
		tally->seen = memory_zeroed(count / 8 + 1, 1);
}

void tally_finish(struct tally *tally)
{
	free(tally->seen);
	*tally = (struct tally){0};
}

void tally_mark(struct tally *tally, int64_t number)
{
	if (number < 0 || (uint64_t)number >= tally->count)
		return;
	tally->marks++;
	if (tally->seen == NULL) {
		tally->distinct += tally->distinct < tally->count;
		return;
	}
	uint8_t bit = (uint8_t)(1u << (number % 8)), *byte = &tally->seen[number / 8];
	tally->distinct += (*byte & bit) == 0;
	*byte |= bit;
}

size_t tally_missing(const struct tally *tally, uint64_t *missing, size_t most)
{
	size_t found = 0;
	for (uint64_t number = 0; tally->seen != NULL && number < tally->count && found < most; number++)
		if ((tally->seen[number / 8] >> (number % 8) & 1) == 0)
			missing[found++] = number;
	return found;
}
