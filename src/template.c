/* See template.h. Readings drift around a mean of their own for each device, as a sensor's would. */
#define _GNU_SOURCE
#include "template.h"

#include "clock.h"
#include "memory.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEXT_BYTES = 512 };

struct template
{
	uint64_t random;
	int64_t devices;
	int digits; /* of the device number, at least 3 */
	cJSON *tree, *device, *sequence, *time, *temperature, *humidity, *battery, *online;
	char run[16];
	char text[TEXT_BYTES];
};

/* SplitMix64 (Steele, Lea, Flood 2014): small, fast, good enough for readings. */
static uint64_t next_random(uint64_t *state)
{
	uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
	z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
	return z ^ (z >> 31);
}

/* A reading between `low` and `high` with `decimals` digits behind the point. */
static double reading(struct template *template, double low, double high, int decimals)
{
	double share = (double)(next_random(&template->random) >> 11) / 9007199254740992.0;
	double scale = pow(10, decimals);
	return round((low + share * (high - low)) * scale) / scale;
}

struct template *template_create(int64_t devices, uint64_t seed)
{
	struct template *template = memory_zeroed(1, sizeof *template);
	template->random = seed;
	template->devices = devices;
	template->digits = 3;
	for (int64_t most = 1000; devices > most; most *= 10)
		template->digits++;
	snprintf(template->run, sizeof template->run, "%08x", (unsigned)(next_random(&template->random) >> 32));
	cJSON *tree = template->tree = cJSON_CreateObject();
	char blank[32] = "                              "; /* room for cJSON_SetValuestring() to write in place */
	template->device = cJSON_AddStringToObject(tree, "device", blank);
	cJSON_AddStringToObject(tree, "run", template->run);
	template->sequence = cJSON_AddNumberToObject(tree, "sequence", 0);
	template->time = cJSON_AddStringToObject(tree, "time", blank);
	template->temperature = cJSON_AddNumberToObject(tree, "temperature", 0);
	template->humidity = cJSON_AddNumberToObject(tree, "humidity", 0);
	template->battery = cJSON_AddNumberToObject(tree, "battery", 0);
	template->online = cJSON_AddBoolToObject(tree, "online", true);
	return template;
}

void template_destroy(struct template *template)
{
	if (template == NULL)
		return;
	cJSON_Delete(template->tree);
	free(template);
}

struct template_message template_render(struct template *template, uint64_t sequence, int64_t now)
{
	char text[32];
	int64_t device = (int64_t)(next_random(&template->random) % (uint64_t) template->devices);
	snprintf(text, sizeof text, "device-%0*lld", template->digits, (long long)device);
	cJSON_SetValuestring(template->device, text);
	clock_format(now, text, sizeof text);
	cJSON_SetValuestring(template->time, text);
	cJSON_SetNumberValue(template->sequence, (double)sequence);
	cJSON_SetNumberValue(template->temperature, reading(template, 18, 26, 2));
	cJSON_SetNumberValue(template->humidity, reading(template, 30, 70, 0));
	cJSON_SetNumberValue(template->battery, reading(template, 3.2, 4.2, 2));
	template->online->type = next_random(&template->random) % 100 == 0 ? cJSON_False : cJSON_True;
	if (!cJSON_PrintPreallocated(template->tree, template->text, TEXT_BYTES, false))
		abort(); /* bounded by its fields */
	return (struct template_message){
	    .device = template->device->valuestring,
	    .payload = template->text,
	    .length = strlen(template->text),
	};
}

const char *template_run(const struct template *template)
{
	return template->run;
}

bool template_topic(const char *topic, const char *device, char *out, size_t size)
{
	static const char place[] = "{device}";
	size_t length = 0;
	while (*topic != 0) {
		bool here = strncmp(topic, place, sizeof place - 1) == 0;
		const char *piece = here ? device : topic;
		size_t piece_length = here ? strlen(device) : 1;
		if (length + piece_length >= size)
			return false;
		memcpy(out + length, piece, piece_length);
		length += piece_length;
		topic += here ? sizeof place - 1 : 1;
	}
	out[length] = 0;
	return true;
}

/* MQTT 5 §4.7: level by level; a level with a device in it may be anything. */
bool template_topic_may_match(const char *topic, const char *filter)
{
	for (;;) {
		size_t topic_level = strcspn(topic, "/"), filter_level = strcspn(filter, "/");
		const char *device = strstr(topic, "{device}");
		bool any = (device != NULL && device < topic + topic_level) || (filter_level == 1 && *filter == '+');
		if (strcmp(filter, "#") == 0)
			return true;
		if (!any && (topic_level != filter_level || strncmp(topic, filter, topic_level) != 0))
			return false;
		if (topic[topic_level] == 0) /* "a/#" matches "a" as well */
			return filter[filter_level] == 0 || strcmp(filter + filter_level, "/#") == 0;
		if (filter[filter_level] == 0)
			return false;
		topic += topic_level + 1;
		filter += filter_level + 1;
	}
}
