/*
 * Checks of values whose meaning goes beyond their type, or that depend on each other; each complaint says what to do.
 * Also what needs the whole configuration before it can be known: the port, secrets kept in files, the directory for
 * state. Start-up only, main thread; reads files, connects to nothing.
 */
#define _GNU_SOURCE
#include "config_table.h"

#include "memory.h"
#include "utf8.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
	PORT_TLS = 8883,
	TEXT_LIMIT = 65535,            /* MQTT 5 §1.5.4 */
	SHARED_LIMIT = TEXT_LIMIT - 8, /* less "$share/" and "/" */
	DATABASE_LIMIT = 63,           /* MongoDB manual, "Naming Restrictions" */
	NAMESPACE_LIMIT = 255,         /* database, dot and collection */
	SECRET_LIMIT = 64 << 10,
	SPOOL_LEAST = 1 << 20,
};

static char *join(const char *directory, const char *name)
{
	return memory_format("%s/%s", directory, name);
}

/* mqtt.host as a URL: say which settings it stands for. The URL may hold a password and is not quoted. */
static void refuse_url(struct config_loader *loader, const char *url)
{
	const char *rest = strstr(url, "://") + 3, *at = config_credentials_end(rest);
	const char *host = at != NULL ? at + 1 : rest;
	int host_length = (int)strcspn(host, ":/?");
	int port_length = host[host_length] == ':' ? (int)strspn(host + host_length + 1, "0123456789") : 0;
	bool tls = strncmp(url, "mqtts:", 6) == 0 || strncmp(url, "ssl:", 4) == 0 || strncmp(url, "tls:", 4) == 0;
	if (strncmp(url, "ws", 2) == 0) {
		config_error(loader,
		             "%s: MQTT over WebSockets is not supported, give the host and port of the "
		             "broker's plain or TLS listener",
		             config_place(loader, "mqtt.host"));
		return;
	}
	config_error(loader, "%s: is a URL, write mqtt.host \"%.*s\"%s%.*s%s%s instead",
	             config_place(loader, "mqtt.host"), host_length, host, port_length != 0 ? ", mqtt.port " : "",
	             port_length, host + host_length + 1, tls ? ", mqtt.tls.enabled true" : "",
	             at != NULL ? ", mqtt.username and mqtt.password_file" : "");
}

/* A host name or an address, as far as its characters go; nothing else may be shown, for it may hold a password. */
static bool is_host(const char *host)
{
	const char *colon = strchr(host, ':');
	return host[strcspn(host, " \t\r\n/@,?#")] == '\0' && (colon == NULL || strchr(colon + 1, ':') != NULL);
}

static void check_host(struct config_loader *loader)
{
	const char *host = loader->config->mqtt.host, *place = config_place(loader, "mqtt.host");
	const char *colon = strchr(host, ':');
	size_t length = strlen(host);
	if (strstr(host, "://") != NULL)
		refuse_url(loader, host);
	else if (host[0] == '[')
		config_error(loader,
		             "%s: write an IPv6 address without brackets, as in \"::1\", and the port in mqtt.port",
		             place);
	else if (strpbrk(host, "/@") == NULL && colon != NULL && strchr(colon + 1, ':') == NULL)
		config_error(loader, "%s: holds a port, write mqtt.host \"%.*s\" and mqtt.port %s instead", place,
		             (int)(colon - host), host,
		             colon[1] != '\0' && strspn(colon + 1, "0123456789") == strlen(colon + 1) ? colon + 1
		                                                                                      : "1883");
	else if (strcspn(host, " \t\r\n/@,?#") != length)
		config_error(loader,
		             "%s: is not a host name or address, there must be no space, slash, comma or @ in it",
		             place);
}

/*
 * A group may read a file that somebody else owns: root:mqtt2mongo with mode 640, a Kubernetes volume with fsGroup;
 * that is how we read it. Of our own file with our own group nobody has chosen who may read it.
 */
static bool is_private(const struct stat *status)
{
	bool ours = status->st_uid == geteuid() && status->st_gid == getegid();
	return (status->st_mode & (S_IROTH | S_IWOTH)) == 0 && (!ours || (status->st_mode & (S_IRGRP | S_IWGRP)) == 0);
}

void config_warn_if_readable(struct config_loader *loader, const char *place, const char *what, const char *path)
{
	struct stat status;
	if (stat(path, &status) == 0 && S_ISREG(status.st_mode) && !is_private(&status))
		config_warning(loader, "%s: %s%s can be read by other users: chmod %s %s", place, path, what,
		               status.st_uid == geteuid() ? "600" : "640", path);
}

bool config_is_loopback(const char *host)
{
	struct in_addr v4;
	struct in6_addr v6;
	size_t length = strlen(host);
	if (strcasecmp(host, "localhost") == 0 || (length > 10 && strcasecmp(host + length - 10, ".localhost") == 0))
		return true;
	if (inet_pton(AF_INET, host, &v4) == 1)
		return ntohl(v4.s_addr) >> 24 == 127;
	return inet_pton(AF_INET6, host, &v6) == 1 &&
	       (IN6_IS_ADDR_LOOPBACK(&v6) || (IN6_IS_ADDR_V4MAPPED(&v6) && v6.s6_addr[12] == 127));
}

static void check_file(struct config_loader *loader, const char *key, const char *path)
{
	if (path == NULL)
		return;
	struct stat status;
	int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (file < 0)
		config_error(loader, "%s: cannot read %s: %s", config_place(loader, key), path, strerror(errno));
	else if (fstat(file, &status) == 0 && S_ISDIR(status.st_mode))
		config_error(loader, "%s: %s is a directory, give a file in PEM format", config_place(loader, key),
		             path);
	if (file >= 0)
		close(file);
}

static void check_tls(struct config_loader *loader)
{
	const struct config_tls *tls = &loader->config->mqtt.tls;
	static const char *const KEYS[] = {"mqtt.tls.ca", "mqtt.tls.cert", "mqtt.tls.key"};
	const char *const files[] = {tls->ca, tls->cert, tls->key};
	for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
		check_file(loader, KEYS[i], files[i]);
		if (files[i] != NULL && !tls->enabled)
			config_error(loader, "%s: has no effect without TLS, set mqtt.tls.enabled to true",
			             config_place(loader, KEYS[i]));
	}
	if (tls->key != NULL)
		config_warn_if_readable(loader, config_place(loader, "mqtt.tls.key"), "", tls->key);
	if (tls->cert != NULL && tls->key == NULL)
		config_error(loader, "%s: needs mqtt.tls.key, the file with the certificate's private key",
		             config_place(loader, "mqtt.tls.cert"));
	if (tls->key != NULL && tls->cert == NULL)
		config_error(loader, "%s: needs mqtt.tls.cert, the file with the key's certificate",
		             config_place(loader, "mqtt.tls.key"));
	if (tls->insecure)
		config_warning(loader,
		               "%s: the broker's host name is not checked, whoever has a certificate of a trusted "
		               "authority can pose as the broker",
		               config_place(loader, "mqtt.tls.insecure"));
}

static void check_mqtt(struct config_loader *loader)
{
	struct config_mqtt *mqtt = &loader->config->mqtt;
	static const char *const ONLY_5[] = {"mqtt.session_expiry", "mqtt.receive_maximum"};
	if (mqtt->tls.enabled && !config_is_set(loader, "mqtt.port"))
		mqtt->port = PORT_TLS;
	if (mqtt->reconnect_min_ms > mqtt->reconnect_max_ms)
		config_error(loader, "%s: is longer than mqtt.reconnect.max, lower it or raise mqtt.reconnect.max",
		             config_place(loader, "mqtt.reconnect.min"));
	if (mqtt->protocol != 5 && mqtt->password != NULL && mqtt->username == NULL)
		config_error(loader, "%s: MQTT 3.1.1 has no password without a user name, set mqtt.username",
		             config_place(loader, config_is_set(loader, "mqtt.password") ? "mqtt.password"
		                                                                         : "mqtt.password_file"));
	if (mqtt->password != NULL && !mqtt->tls.enabled && is_host(mqtt->host) && !config_is_loopback(mqtt->host))
		config_warning(loader,
		               "%s: the password goes to %s unencrypted, whoever is on the way can read it; set "
		               "mqtt.tls.enabled to true",
		               config_place(loader, config_is_set(loader, "mqtt.password") ? "mqtt.password"
		                                                                           : "mqtt.password_file"),
		               mqtt->host);
	for (size_t i = 0; i < sizeof ONLY_5 / sizeof ONLY_5[0] && mqtt->protocol != 5; i++)
		if (config_is_set(loader, ONLY_5[i]))
			config_warning(loader, "%s: has no effect with MQTT 3.1.1, there the broker decides",
			               config_place(loader, ONLY_5[i]));
	if (mqtt->session_expiry_ms == 0 && mqtt->protocol == 5)
		config_warning(loader,
		               "%s: the broker forgets unacknowledged messages with the connection, a restart or "
		               "a network failure loses them",
		               config_place(loader, "mqtt.session_expiry"));
}

/* The text is UTF-8 as MQTT wants it: well formed, no control characters (MQTT 5 §1.5.4, RFC 3629). */
static bool is_mqtt_text(const char *text)
{
	for (const uint8_t *at = (const uint8_t *)text; *at != 0; at += utf8_character(at))
		if (utf8_character(at) == 0 || utf8_is_control(at))
			return false;
	return true;
}

/* What is wrong with a topic filter (MQTT 5 §4.7), or NULL. */
static const char *filter_fault(const char *filter)
{
	if (strlen(filter) > TEXT_LIMIT)
		return "is longer than 65535 bytes, MQTT allows no more";
	if (!is_mqtt_text(filter))
		return "is not UTF-8 without control characters, as MQTT topics must be";
	if (strncmp(filter, "$share/", 7) == 0 || strcmp(filter, "$share") == 0)
		return "give the filter without $share/GROUP/, and the name of the group in consumer.share";
	if (strchr(filter, ',') != NULL)
		return "holds a comma, " CONFIG_ONE_FILTER "; for a comma in a topic write + for that level";
	for (const char *level = filter; level != NULL; level = strchr(level, '/') ? strchr(level, '/') + 1 : NULL) {
		size_t length = strcspn(level, "/");
		if (memchr(level, '#', length) != NULL && (length != 1 || level[1] != '\0'))
			return "# must be a whole level and the last one, as in sensors/#";
		if (memchr(level, '+', length) != NULL && length != 1)
			return "+ must be a whole level, as in sensors/+/readings";
	}
	return NULL;
}

/* Is there a topic that both filters match (MQTT 5 §4.7)? Both are without fault. */
static bool filters_meet(const char *a, const char *b)
{
	bool reserved = (a[0] == '$') != (b[0] == '$'); /* no wildcard stands for a first level with $ */
	if (reserved && strchr("+#", a[0] == '$' ? b[0] : a[0]) != NULL)
		return false;
	for (;;) {
		size_t a_length = strcspn(a, "/"), b_length = strcspn(b, "/");
		if (a[0] == '#' || b[0] == '#')
			return true;
		if (a[0] != '+' && b[0] != '+' && (a_length != b_length || memcmp(a, b, a_length) != 0))
			return false;
		a += a_length;
		b += b_length;
		if (*a == '\0' || *b == '\0') /* "x/#" matches "x" too */
			return strcmp(*a == '\0' ? b : a, "") == 0 || strcmp(*a == '\0' ? b : a, "/#") == 0;
		a++;
		b++;
	}
}

static void check_publisher_topic(struct config_loader *loader)
{
	const char *topic = loader->config->publisher.topic, *place = config_place(loader, "publisher.topic");
	if (strlen(topic) > TEXT_LIMIT)
		config_error(loader, "%s: is longer than 65535 bytes, MQTT allows no more", place);
	else if (!is_mqtt_text(topic))
		config_error(loader, "%s: is not UTF-8 without control characters, as MQTT topics must be", place);
	else if (strpbrk(topic, "+#") != NULL)
		config_error(loader,
		             "%s: + and # are for subscribing only, write {device} where the device's name shall "
		             "stand",
		             place);
	for (const char *brace = strchr(topic, '{'); brace != NULL; brace = strchr(brace + 1, '{'))
		if (strncmp(brace, "{device}", 8) != 0)
			config_warning(loader, "%s: only {device} is replaced, other braces are published as they are",
			               place);
}

/* What is wrong with a collection's name (MongoDB manual, "Naming Restrictions"), or NULL. */
static const char *collection_fault(const char *name, const char *database)
{
	if (strchr(name, '$') != NULL)
		return "MongoDB allows no $ in a collection's name";
	if (strncmp(name, "system.", 7) == 0)
		return "names that start with system. belong to MongoDB itself";
	if (name[0] == '.' || name[strlen(name) - 1] == '.' || strstr(name, "..") != NULL)
		return "a collection's name must not start or end with a dot or hold two in a row";
	if (strpbrk(name, "{}") != NULL)
		return "nothing is put in for braces, all messages go into one collection; give a name without them";
	if (strlen(database) + 1 + strlen(name) > NAMESPACE_LIMIT)
		return "database and collection together are longer than 255 bytes, MongoDB allows no more";
	return is_mqtt_text(name) ? NULL : "is not UTF-8 without control characters";
}

static const char *database_fault(const char *name)
{
	if (strpbrk(name, "/\\. \"$*<>:|?") != NULL)
		return "MongoDB allows no space and none of / \\ . \" $ * < > : | ? in a database's name";
	if (strlen(name) > DATABASE_LIMIT)
		return "is longer than 63 bytes, MongoDB allows no more";
	if (strcasecmp(name, "admin") == 0 || strcasecmp(name, "local") == 0 || strcasecmp(name, "config") == 0)
		return "admin, local and config belong to MongoDB itself, choose another name";
	return is_mqtt_text(name) ? NULL : "is not UTF-8 without control characters";
}

static void complain(struct config_loader *loader, const char *key, const char *fault)
{
	if (fault != NULL)
		config_error(loader, "%s: %s", config_place(loader, key), fault);
}

/* The broker would close the connection without a reason (MQTT 5 §3.1.3). Room is left for what is appended to the id.
 */
static void check_identity(struct config_loader *loader)
{
	static const char *const KEYS[] = {"mqtt.client_id", "mqtt.username"};
	const char *const texts[] = {loader->config->mqtt.client_id, loader->config->mqtt.username};
	for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
		if (texts[i] == NULL)
			continue;
		if (strlen(texts[i]) > TEXT_LIMIT - 16)
			complain(loader, KEYS[i], "is longer than 65519 bytes, MQTT allows no more");
		else if (!is_mqtt_text(texts[i]))
			complain(loader, KEYS[i], "is not UTF-8 without control characters, as MQTT wants it");
	}
}

static void settle_id(struct config_loader *loader)
{
	struct config_consumer *consumer = &loader->config->consumer;
	char *fault =
	    id_rule_parse(&consumer->id, (const char *const *)consumer->id_parts.items, consumer->id_parts.count);
	complain(loader, "consumer.id", fault);
	if (consumer->id.property_count > 0 && loader->config->mqtt.protocol != 5)
		complain(loader, "consumer.id",
		         "MQTT 3.1.1 has no user properties, take another part or set mqtt.protocol to \"5\"");
	free(fault);
}

/* What a share group must not be called (MQTT 5 §4.8.2), or NULL. */
static const char *share_fault(const char *share)
{
	if (share[0] == 0)
		return "is empty, a share group needs a name";
	if (strpbrk(share, "/+#") != NULL)
		return "the name of a share group holds no / + #, as in \"plant-7\"";
	if (!is_mqtt_text(share))
		return "is not UTF-8 without control characters, as MQTT wants it";
	return NULL;
}

static void check_share(struct config_loader *loader)
{
	const struct config_consumer *consumer = &loader->config->consumer;
	const char *client_id = loader->config->mqtt.client_id;
	if (consumer->share != NULL) {
		const char *fault = share_fault(consumer->share);
		complain(loader, "consumer.share",
		         fault == NULL && strlen(consumer->share) + strlen(consumer->topic) > SHARED_LIMIT
		             ? "is too long, with consumer.topic it makes more than the 65535 bytes MQTT allows"
		             : fault);
		if (consumer->qos == 0)
			complain(loader, "consumer.share",
			         "has no effect with consumer.qos 0, whose one connection gets every message");
	} else if (consumer->connections > 1 && client_id != NULL && share_fault(client_id) != NULL) {
		complain(
		    loader, "consumer.connections",
		    "several connections form a share group, which cannot have the name of mqtt.client_id because of "
		    "its / + or #; give one in consumer.share");
	}
	if (config_shares(consumer) && loader->config->mqtt.protocol != 5)
		config_warning(
		    loader,
		    "%s: MQTT 3.1.1 has no shared subscriptions; a broker that does not know them takes the filter for "
		    "an ordinary one, on which nothing ever comes",
		    config_place(loader, consumer->share != NULL ? "consumer.share" : "consumer.connections"));
	if (consumer->qos == 0 && consumer->connections > 1)
		complain(loader, "consumer.connections", "with consumer.qos 0 there is one connection only");
}

/* The two filters are subscribed on two connections: the broker sends a message that both match on each. */
static void check_qos0_topic(struct config_loader *loader)
{
	const struct config_consumer *consumer = &loader->config->consumer;
	const char *fault = consumer->qos0_topic == NULL ? NULL : filter_fault(consumer->qos0_topic);
	if (consumer->qos0_topic == NULL)
		return;
	if (consumer->qos == 0)
		fault = "has no effect with consumer.qos 0, which takes consumer.topic that way";
	else if (fault == NULL && filter_fault(consumer->topic) == NULL &&
	         filters_meet(consumer->topic, consumer->qos0_topic))
		fault =
		    "a topic can match this filter and consumer.topic as well, and its messages would be stored twice; "
		    "narrow one of the two, or leave this one out";
	complain(loader, "consumer.qos0_topic", fault);
}

static void check_consumer(struct config_loader *loader)
{
	struct config_consumer *consumer = &loader->config->consumer;
	const char *database = loader->config->mongodb.database;
	complain(loader, "consumer.topic", filter_fault(consumer->topic));
	check_share(loader);
	complain(loader, "mongodb.database", database_fault(database));
	complain(loader, "consumer.collection", collection_fault(consumer->collection, database));
	complain(loader, "consumer.dead_letter", collection_fault(consumer->dead_letter, database));
	if (strcmp(consumer->collection, consumer->dead_letter) == 0)
		complain(loader, "consumer.dead_letter",
		         "is the same as consumer.collection, dead letters need a collection of their own");
	check_qos0_topic(loader);
	if (consumer->qos == 0)
		config_warning(loader,
		               "%s: 0 promises less than 1: what is on its way while a connection or process ends "
		               "is lost",
		               config_place(loader, "consumer.qos"));
	if (consumer->qos == 2)
		config_note(loader, "%s: subscribed as QoS 1, which loses nothing either; a message can come twice",
		            config_place(loader, "consumer.qos"));
	/* A small batch beside the default of max_payload is no contradiction: one message always fits. */
	if (consumer->batch_bytes >= consumer->max_payload)
		return;
	if (!config_is_set(loader, "consumer.batch.bytes"))
		consumer->batch_bytes = consumer->max_payload;
	else if (config_is_set(loader, "consumer.max_payload"))
		complain(loader, "consumer.batch.bytes",
		         "is less than consumer.max_payload, a batch must hold at least one message");
}

static void check_write_concern(struct config_loader *loader)
{
	const struct config_mongodb *mongodb = &loader->config->mongodb;
	static const char w_key[] = "mongodb.write_concern.w", j_key[] = "mongodb.write_concern.j";
	size_t digits = strspn(mongodb->w, "-0123456789");
	bool number = mongodb->w[digits] == '\0';
	long members = number ? strtol(mongodb->w, NULL, 10) : 0;
	if (number && members == 0)
		complain(loader, w_key,
		         "0 is refused, acknowledging to the broker would promise nothing; the least is 1");
	else if ((number && (members < 0 || members > 50)) || (!number && mongodb->w[0] == '-'))
		complain(loader, w_key, "must be majority, 1 to 50 members, or the name of a write concern");
	else if (number)
		config_warning(loader,
		               "%s: %s promises less than majority, unless that many members are one: a stored "
		               "message can be rolled back when the primary fails",
		               config_place(loader, w_key), mongodb->w);
	if (!mongodb->j)
		config_warning(loader,
		               "%s: false promises less than the default: a stored message can be lost when the "
		               "database crashes",
		               config_place(loader, j_key));
}

/* One line feed at the end, also as CR LF, is the editor's and not the secret's. */
static void strip_line_feed(char *text, size_t length)
{
	if (length > 0 && text[length - 1] == '\n')
		text[--length] = '\0';
	if (length > 0 && text[length - 1] == '\r')
		text[--length] = '\0';
}

/* Replace *secret by what the file holds. `key` names the secret, `file_key` the file. */
static void read_secret(struct config_loader *loader, const char *key, const char *file_key, const char *path,
                        char **secret)
{
	size_t length;
	if (path == NULL)
		return;
	if (config_is_set(loader, key)) {
		config_error(loader, "%s: %s is set as well, keep one of the two", config_place(loader, file_key),
		             config_place(loader, key));
		return;
	}
	char *text = config_slurp(path, SECRET_LIMIT, &length);
	if (text == NULL) {
		config_error(loader, "%s: cannot read %s: %s", config_place(loader, file_key), path, strerror(errno));
		return;
	}
	config_warn_if_readable(loader, config_place(loader, file_key), "", path);
	bool nul = memchr(text, '\0', length) != NULL;
	strip_line_feed(text, length);
	if (nul)
		config_error(loader, "%s: %s holds a NUL byte, it must be text", config_place(loader, file_key), path);
	else if (text[0] == '\0')
		config_error(loader, "%s: %s is empty, write the secret into it", config_place(loader, file_key), path);
	memory_wipe_free(*secret);
	*secret = memory_string(text);
	explicit_bzero(text, length);
	free(text);
}

static bool is_writable(const char *directory)
{
	return access(directory, W_OK | X_OK) == 0;
}

/* The first place that fits, allocated; NULL when there is none. */
static char *find_state_dir(const struct config_loader *loader)
{
	static const char ours[] = "/var/lib/mqtt2mongo";
	const char *systemd = config_environment(loader, "STATE_DIRECTORY");
	const char *xdg = config_environment(loader, "XDG_STATE_HOME"), *home = config_environment(loader, "HOME");
	if (systemd != NULL && systemd[0] != '\0')
		return strndup(systemd, strcspn(systemd, ":")); /* systemd.exec(5): several are joined by colons */
	if (is_writable(ours) || (access(ours, F_OK) != 0 && is_writable("/var/lib")))
		return memory_string(ours);
	if (xdg != NULL && xdg[0] == '/')
		return join(xdg, "mqtt2mongo");
	return home != NULL && home[0] == '/' ? join(home, ".local/state/mqtt2mongo") : NULL;
}

static void settle_state_dir(struct config_loader *loader)
{
	if (loader->config->state_dir == NULL)
		loader->config->state_dir = find_state_dir(loader);
	if (loader->config->state_dir == NULL)
		config_error(loader, "state_dir: no place found for what must survive a restart, there is no HOME; set "
		                     "state_dir");
}

static void settle_spool(struct config_loader *loader)
{
	struct config *config = loader->config;
	if (config->spool.path == NULL && config->state_dir != NULL)
		config->spool.path = join(config->state_dir, "spool.db");
	if (config->spool.max_size > 0 && config->spool.max_size < SPOOL_LEAST)
		complain(loader, "spool.max_size", "is less than 1MiB; write 0 for no spool");
}

/* The port behind the address, or 0. */
static int parse_port(const char *text)
{
	size_t digits = strspn(text, "0123456789");
	if (digits == 0 || digits > 5 || text[digits] != '\0')
		return 0;
	int port = atoi(text);
	return port <= 65535 ? port : 0;
}

/* What is wrong with "ADDRESS:PORT", or NULL; the address is without brackets then. */
static const char *split_listen(const char *listen, struct config_http *http)
{
	struct in6_addr binary;
	const char *colon = strrchr(listen, ':');
	bool brackets = listen[0] == '[';
	if (strstr(listen, "://") != NULL)
		return "is a URL, write address and port only, as in 127.0.0.1:9641";
	if (colon == NULL || colon == listen || (http->port = parse_port(colon + 1)) == 0)
		return "must be off, or an address and a port from 1 to 65535, as in 127.0.0.1:9641 or [::1]:9641";
	size_t length = (size_t)(colon - listen);
	if (brackets && listen[length - 1] != ']')
		return "has no ] before the port, write an IPv6 address as in [::1]:9641";
	if (!brackets && memchr(listen, ':', length) != NULL)
		return "write an IPv6 address in brackets, as in [::1]:9641";
	snprintf(http->address, sizeof http->address, "%.*s", (int)(brackets ? length - 2 : length),
	         listen + (brackets ? 1 : 0));
	if (strcmp(http->address, "localhost") == 0)
		snprintf(http->address, sizeof http->address, "127.0.0.1");
	if (inet_pton(brackets ? AF_INET6 : AF_INET, http->address, &binary) != 1)
		return "needs an address of this machine, not a name: 127.0.0.1 for this machine only, 0.0.0.0 or [::] "
		       "for "
		       "everybody, as in 127.0.0.1:9641";
	return NULL;
}

/* What is wrong with a name that http is asked by, or NULL. */
static const char *http_host_fault(const char *name)
{
	if (strstr(name, "://") != NULL || strpbrk(name, ":/") != NULL)
		return "give names only, as in status.example.org, without http://, port or path";
	if (strchr(name, '*') != NULL)
		return "* stands for nothing here, give each name in full";
	return name[0] == '\0' || strpbrk(name, " \t[]@?#") != NULL ? "must be a list of host names" : NULL;
}

static void check_http(struct config_loader *loader)
{
	struct config_http *http = &loader->config->http;
	for (size_t i = 0; i < http->hosts.count; i++)
		if (http_host_fault(http->hosts.items[i]) != NULL) {
			complain(loader, "http.hosts", http_host_fault(http->hosts.items[i]));
			break;
		}
	if (strcmp(http->listen, "off") == 0)
		return;
	const char *fault = split_listen(http->listen, http);
	complain(loader, "http.listen", fault);
	http->enabled = fault == NULL;
	if (http->enabled && strncmp(http->address, "127.", 4) != 0 && strcmp(http->address, "::1") != 0)
		config_warning(loader,
		               "%s: whoever reaches this address can read the figures, there is neither a password nor "
		               "TLS; 127.0.0.1:%d serves this machine only",
		               config_place(loader, "http.listen"), http->port);
}

void config_check(struct config_loader *loader)
{
	struct config *config = loader->config;
	if (loader->secret_in_file)
		config_warn_if_readable(loader, "-c", " holds a secret and", config->file);
	read_secret(loader, "mqtt.password", "mqtt.password_file", config->mqtt.password_file, &config->mqtt.password);
	read_secret(loader, "mongodb.uri", "mongodb.uri_file", config->mongodb.uri_file, &config->mongodb.uri);
	check_host(loader);
	check_tls(loader);
	check_mqtt(loader);
	check_identity(loader);
	check_write_concern(loader);
	check_consumer(loader);
	settle_id(loader);
	check_publisher_topic(loader);
	settle_state_dir(loader);
	settle_spool(loader);
	check_http(loader);
	if (config->core_dumps)
		config_warning(loader,
		               "%s: a core dump holds passwords and messages; take this out when the fault is found",
		               config_place(loader, "core_dumps"));
	config_check_uri(loader);
}
