/*
 * See mqtt.h. How one connection lives:
 *
 *   IDLE -> BACKOFF -> RESOLVING -> PROBING -> CONNECTING -> HANDSHAKE -> UP -> IDLE …           (CLOSING ends it)
 *
 * Name resolution and TCP are tried on the loop first (uv_getaddrinfo, a probe with uv_tcp_connect), under the connect
 * timeout, because the library can only do both blocking and without a limit. Then its blocking connect runs as one job
 * in a worker, where it meets an address known to answer. The loop adopts the socket: it polls a dup() of it, so that
 * the library may close its own descriptor at any moment without pulling it from under libuv. TLS advances through
 * mosquitto_loop_read().
 *
 * After every call into the library that may end the connection, over() decides; nothing is destroyed from inside the
 * library's callbacks, which only leave a note (`doomed`, `closing`).
 */
#define _GNU_SOURCE
#include "mqtt.h"

#include "backoff.h"
#include "build.h"
#include "log.h"
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <mosquitto.h>
#include <mqtt_protocol.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
	STABLE_MS = 5000,          /* a connection that lasted this long forgets earlier failures */
	CLOSE_MS = 1000,           /* after DISCONNECT, wait this long for the broker to hang up, */
	CLOSE_CONSUMER_MS = 60000, /* and longer where it may still have PUBACKs to read */
	KEEPALIVE_TICK_MS = 1000,
	BURST_MS = 40,       /* read at most this long before the loop gets its turn */
	CLOCK_EVERY = 64,    /* reads between two looks at the clock */
	SEND_MAXIMUM = 1000, /* our own window towards a broker that states none */
	REST_MS = 2,         /* between two looks at the socket, where it is read seldom */
	RESENT_MS = 1000, /* held so long, a message may be sent again on the same connection by brokers that do so */
	REASON_TEXT = 256,
};

#define NO_TLS "this port does not speak TLS; check mqtt.port and mqtt.tls.enabled"
#define CUT_OFF                                                                                                        \
	"the broker ended the handshake; does it ask for a client certificate (mqtt.tls.cert and mqtt.tls.key), or "   \
	"another?"
#define SELF_SIGNED                                                                                                    \
	"the broker's certificate is self-signed; when it is the right one, give it as mqtt.tls.ca (a copy of the "    \
	"certificate, not of its key)"
#define SAME_ID "; when that happens again and again, another client may use the same client id (mqtt.client_id)"

enum state { IDLE, BACKOFF, RESOLVING, PROBING, CONNECTING, HANDSHAKE, UP, CLOSING, CLOSED };

/* What is polled for one connection. Lives until uv_close() is through, which may be after the next one has begun. */
struct link {
	uv_poll_t poll;
	int fd; /* a dup() of the library's socket */
	struct mqtt *mqtt;
};

/* A TCP connect that only finds out whether an address answers. */
struct probe {
	uv_tcp_t tcp;
	uv_connect_t request;
	struct mqtt *mqtt;
};

struct mqtt {
	uv_loop_t *loop;
	const struct config_mqtt *config;
	struct mqtt_handler handler;
	void *owner;
	char *client_id, *address;
	const char *name;
	bool clean_start, keep_client, quiet;
	uint32_t expiry_s; /* of the session, as it is asked for under MQTT 5 */
	bool ends_session; /* with its DISCONNECT */

	enum state state;
	struct mosquitto *client;
	struct link *link; /* NULL unless HANDSHAKE, UP or CLOSING */
	int mask;          /* events polled for */
	uint64_t generation;
	size_t held;                    /* handed over, not durable; the gate is open at 0 */
	uint64_t activity;              /* callbacks from the library, to tell progress from a lying errno */
	uint64_t messages;              /* handed over in this generation */
	size_t queued;                  /* packets of ours since the last flush */
	bool duplicate;                 /* the DUP flag of the message about to be handed over */
	bool listening;                 /* to the library's log, for DUP flags */
	bool round_acks, round_repeats; /* among what is held were messages of QoS 1, or with DUP */
	uint64_t held_at;               /* loop time at which the gate closed */
	bool in_library;                /* a callback is above us on the stack: nothing may be destroyed */
	bool in_burst;                  /* handler->drained is above us on the stack */
	bool resting;                   /* the socket is left alone, until `timer` */
	bool phantom; /* the library wants to write, but a flush sends nothing: TLS waits for the peer. No reason to
	                 poll */

	uv_timer_t timer; /* backoff, connect timeout, rest, close timeout: one at a time */
	uv_timer_t keepalive;
	uint64_t deadline; /* of the connect attempt, loop time */
	uint64_t up_at;
	unsigned failures;
	struct log_repeat complaint, foreign;
	char doomed[REASON_TEXT];  /* why the attempt is to be given up as soon as that is possible */
	char library[REASON_TEXT]; /* the library's last error line */
	long verified;             /* what OpenSSL said of the broker's certificate when there was an error */
	char refusal[REASON_TEXT]; /* what CONNACK or DISCONNECT said */

	uv_getaddrinfo_t resolve;
	struct addrinfo *addresses, *next_address;
	struct probe *probe;
	char numeric[NI_MAXHOST];
	uv_work_t job;
	mosquitto_property *asked; /* of CONNECT; the job's while it runs */
	int job_result, job_errno;

	bool closing;
	bool goodbye; /* DISCONNECT has left; what remains is to wait for the broker */
	void (*closed)(void *owner);
	int handles;
};

static void finish_close(struct mqtt *mqtt);
static void tell_when_closed(struct mqtt *mqtt);
static void close_gracefully(struct mqtt *mqtt);
static void read_burst(struct mqtt *mqtt);
static void update_poll(struct mqtt *mqtt);

static enum log_level level(const struct mqtt *mqtt, enum log_level usual)
{
	return mqtt->quiet ? LOG_LEVEL_DEBUG : usual;
}

/* ---- what the library says must not be ignored: the compiler sees to it ---- */

#define CHECKED __attribute__((warn_unused_result))
__typeof__(mosquitto_threaded_set) mosquitto_threaded_set CHECKED;
__typeof__(mosquitto_int_option) mosquitto_int_option CHECKED;
__typeof__(mosquitto_username_pw_set) mosquitto_username_pw_set CHECKED;
__typeof__(mosquitto_tls_set) mosquitto_tls_set CHECKED;
__typeof__(mosquitto_tls_insecure_set) mosquitto_tls_insecure_set CHECKED;
__typeof__(mosquitto_property_add_int32) mosquitto_property_add_int32 CHECKED;
__typeof__(mosquitto_connect_bind_v5) mosquitto_connect_bind_v5 CHECKED;
__typeof__(mosquitto_subscribe_v5) mosquitto_subscribe_v5 CHECKED;
__typeof__(mosquitto_unsubscribe_v5) mosquitto_unsubscribe_v5 CHECKED;
__typeof__(mosquitto_publish_v5) mosquitto_publish_v5 CHECKED;
__typeof__(mosquitto_disconnect_v5) mosquitto_disconnect_v5 CHECKED;
__typeof__(mosquitto_loop_read) mosquitto_loop_read CHECKED;
__typeof__(mosquitto_loop_write) mosquitto_loop_write CHECKED;
__typeof__(mosquitto_loop_misc) mosquitto_loop_misc CHECKED;

/* ---- the end of a connection ---- */

static void link_closed(uv_handle_t *handle)
{
	struct link *link = container_of(handle, struct link, poll);
	struct mqtt *mqtt = link->mqtt;
	close(link->fd);
	free(link);
	mqtt->handles--;
	tell_when_closed(mqtt);
}

static void drop_link(struct mqtt *mqtt)
{
	if (mqtt->link == NULL)
		return;
	if (mqtt->keep_client) /* the library keeps its descriptor until the next connect; the broker should not wait
	                          for that */
		shutdown(mqtt->link->fd, SHUT_RDWR);
	uv_close((uv_handle_t *)&mqtt->link->poll, link_closed);
	mqtt->link = NULL;
	mqtt->mask = 0;
}

static void drop_client(struct mqtt *mqtt)
{
	if (mqtt->client != NULL)
		mosquitto_destroy(mqtt->client);
	mqtt->client = NULL;
	mqtt->listening = false;
}

/* The generation is over: unsent PUBACKs go with the client. Not from inside the library, nor while a job runs. */
static void drop_connection(struct mqtt *mqtt)
{
	uv_timer_stop(&mqtt->timer);
	uv_timer_stop(&mqtt->keepalive);
	drop_link(mqtt);
	if (!mqtt->keep_client)
		drop_client(mqtt);
	mqtt->generation++;
	mqtt->held = 0;
	mqtt->messages = 0;
	mqtt->queued = 0;
	mqtt->phantom = false;
	mqtt->resting = false;
	mqtt->doomed[0] = 0;
}

/* `why` may be mqtt->doomed: it is written before it is forgotten. */
static void fail(struct mqtt *mqtt, const char *why)
{
	if (mqtt->state == UP && uv_now(mqtt->loop) - mqtt->up_at >= STABLE_MS)
		mqtt->failures = 0;
	mqtt->failures++;
	log_repeat(&mqtt->complaint, level(mqtt, LOG_LEVEL_WARN), "mqtt", "%s: %s: %s", mqtt->name, mqtt->address, why);
	drop_connection(mqtt);
	mqtt->state = IDLE;
	if (mqtt->handler.down != NULL && !mqtt->closing)
		mqtt->handler.down(mqtt->owner);
}

static void doom(struct mqtt *mqtt, const char *why)
{
	if (mqtt->doomed[0] == 0)
		snprintf(mqtt->doomed, sizeof mqtt->doomed, "%s", why);
}

/* What OpenSSL and the library say of TLS, and the remedy. "" is a connection that was cut during the handshake. */
static const char *tls_remedy(const char *text)
{
	static const struct {
		const char *part, *remedy;
	} remedies[] = {
	    {"host name verification", "the certificate is for another host name; set mqtt.host to a name it holds"},
	    {"certificate verify failed",
	     "certificate verify failed: the broker's certificate is not signed by mqtt.tls.ca, "
	     "has expired, or is for another host name than mqtt.host"},
	    {"Unable to load CA", "mqtt.tls.ca holds no certificate in PEM format"},
	    {"Unable to load client certificate", "mqtt.tls.cert holds no certificate in PEM format"},
	    {"Unable to load client key", "mqtt.tls.key holds no private key in PEM format without a passphrase"},
	    {"inconsistent", "mqtt.tls.key is not the key of the certificate in mqtt.tls.cert"},
	    {" alert ", CUT_OFF},
	    {"wrong version number", NO_TLS},
	    {"unexpected eof", NO_TLS},
	    {"unexpected message", NO_TLS},
	};
	for (size_t i = 0; i < sizeof remedies / sizeof *remedies; i++)
		if (strstr(text, remedies[i].part) != NULL)
			return remedies[i].remedy;
	return text[0] != 0 ? text : CUT_OFF;
}

static bool is_tls_loss(const struct mqtt *mqtt, int result, int error)
{
	return result == MOSQ_ERR_TLS || (mqtt->config->tls.enabled && mqtt->state == HANDSHAKE &&
	                                  (error == EPROTO || error == ECONNRESET || error == EPIPE));
}

static bool is_hang_up(int result, int error)
{
	return result == MOSQ_ERR_CONN_LOST ||
	       (result == MOSQ_ERR_ERRNO && error == 0); /* between, or within packets */
}

static void describe_loss(struct mqtt *mqtt, int result, int error, char *text, size_t size)
{
	const char *listener = mqtt->config->tls.enabled ? "an MQTT listener" : "an MQTT listener without TLS";
	if (mqtt->refusal[0] != 0)
		snprintf(text, size, "%s", mqtt->refusal);
	else if (is_tls_loss(mqtt, result, error))
		snprintf(text, size, "TLS failed: %s",
		         mqtt->verified == X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT ? SELF_SIGNED
		                                                                  : tls_remedy(mqtt->library));
	else if (is_hang_up(result, error) && mqtt->state == HANDSHAKE)
		snprintf(text, size, "the broker hung up before it answered; is this the port of %s?%s", listener,
		         mqtt->config->protocol == 5 ? " If it is an old one, try mqtt.protocol 3.1.1" : "");
	else if (is_hang_up(result, error))
		snprintf(text, size, "connection lost: the broker hung up" SAME_ID);
	else if (mqtt->state == HANDSHAKE && (result == MOSQ_ERR_PROTOCOL || result == MOSQ_ERR_MALFORMED_PACKET))
		snprintf(text, size,
		         "protocol error: the answer is no MQTT, or not as it should be; is this the port of %s?",
		         listener);
	else if (result == MOSQ_ERR_KEEPALIVE)
		snprintf(text, size, "connection lost: the broker did not answer a ping within mqtt.keepalive");
	else if (result == MOSQ_ERR_ERRNO)
		snprintf(text, size, "connection lost: %s%s", strerror(error), error == ECONNRESET ? SAME_ID : "");
	else
		snprintf(text, size, "connection lost: %s", mosquitto_strerror(result));
}

/* After a call into the library: true when the connection has ended, and then everything has been done about it. */
static bool over(struct mqtt *mqtt, int result, int error)
{
	if (result != MOSQ_ERR_SUCCESS || mosquitto_socket(mqtt->client) == -1) {
		char why[REASON_TEXT + 64];
		describe_loss(mqtt, result, error, why, sizeof why);
		fail(mqtt, why);
	} else if (mqtt->doomed[0] != 0) {
		fail(mqtt, mqtt->doomed);
	} else if (!mqtt->closing) {
		return false;
	}
	if (mqtt->closing)
		close_gracefully(mqtt);
	return true;
}

/* ---- the gate ---- */

static bool gate_open(const struct mqtt *mqtt)
{
	return MQTT2MONGO_GATE_OPEN || mqtt->held == 0;
}

static bool is_consumer(const struct mqtt *mqtt)
{
	return mqtt->handler.message != NULL;
}

static bool may_read(const struct mqtt *mqtt)
{
	if (mqtt->state != UP || !is_consumer(mqtt))
		return true;
	return mqtt->handler.room == NULL || mqtt->handler.room(mqtt->owner);
}

/* Nothing is held, or more may be read all the same: what is unsent then are PUBACKs, which wait for the gate. */
static enum mqtt_reading reading(const struct mqtt *mqtt)
{
	if (mqtt->held == 0)
		return MQTT_READ_ON;
	return mqtt->handler.reading != NULL ? mqtt->handler.reading(mqtt->owner) : MQTT_READ_NOTHING;
}

static bool unsent(const struct mqtt *mqtt)
{
	return mosquitto_want_write(mqtt->client) && !mqtt->phantom;
}

/* Nothing may be read now. */
static bool is_blocked(const struct mqtt *mqtt)
{
	if (!is_consumer(mqtt) || mqtt->state != UP)
		return false;
	return mqtt->held != 0 ? reading(mqtt) == MQTT_READ_NOTHING : unsent(mqtt);
}

/* One segment for many PUBACKs: without it each leaves in a packet of its own. */
static void set_cork(struct mqtt *mqtt, int on)
{
	setsockopt(mqtt->link->fd, IPPROTO_TCP, TCP_CORK, &on, sizeof on);
}

/* Nothing will be written for a while that could carry TCP's acknowledgement, and the kernel would wait 40 ms for it. A
 * broker that has not switched Nagle's algorithm off (mosquitto, by default) sends no further small packet before. */
static void acknowledge_segments(const struct link *link)
{
	static const int on = 1;
	setsockopt(link->fd, IPPROTO_TCP, TCP_QUICKACK, &on, sizeof on);
}

static void on_log(struct mosquitto *client, void *context, int level, const char *text);

/* With a log callback the library formats two lines a message, a third of all its instructions. They are listened to,
 * for the DUP flag, where a message may come again: from each connect on, for what was unacknowledged comes first then
 * (MQTT 5 §4.4), and after a long hold, for there are brokers that send again on a live connection; in both cases until
 * a round has none. */
static void listen_to_log(struct mqtt *mqtt, bool listening)
{
	if (mqtt->listening != listening)
		mosquitto_log_callback_set(mqtt->client, listening ? on_log : NULL);
	mqtt->listening = listening;
}

/* The gate opens. */
static void end_round(struct mqtt *mqtt)
{
	if (uv_now(mqtt->loop) - mqtt->held_at >= RESENT_MS)
		listen_to_log(mqtt, true);
	else if (mqtt->round_acks && !mqtt->round_repeats)
		listen_to_log(mqtt, false);
}

/* Send everything queued. Returns false when the connection ended over it. */
static bool flush(struct mqtt *mqtt)
{
	bool many = mqtt->queued > 1;
	if (mqtt->link == NULL || !gate_open(mqtt) || !mosquitto_want_write(mqtt->client))
		return true;
	mqtt->queued = 0;
	if (many)
		set_cork(mqtt, 1);
	errno = 0;
	mqtt->in_library = true;
	int result = mosquitto_loop_write(mqtt->client, 1);
	int error = errno;
	mqtt->in_library = false;
	if (many)
		set_cork(mqtt, 0);
	if (over(mqtt, result, error))
		return false;
	mqtt->phantom = mosquitto_want_write(mqtt->client) && error != EAGAIN;
	return true;
}

void mqtt_flush(struct mqtt *mqtt)
{
	if (mqtt->state != UP || mqtt->in_library)
		return;
	if (flush(mqtt))
		update_poll(mqtt);
}

void mqtt_durable(struct mqtt *mqtt, uint64_t generation, size_t count)
{
	if (generation != mqtt->generation || mqtt->state != UP)
		return;
	if (count > mqtt->held)
		abort(); /* a message counted durable twice could cover for one that is not */
	mqtt->held -= count;
	if (mqtt->held == 0)
		end_round(mqtt);
	if (mqtt->held != 0 || mqtt->in_burst || mqtt->in_library) /* who called us flushes, and goes on */
		return;
	if (!flush(mqtt))
		return;
	if (!unsent(mqtt))
		read_burst(mqtt); /* what came meanwhile; TLS may hold bytes no poll would report */
	if (mqtt->link != NULL)
		update_poll(mqtt);
}

/* ---- callbacks from inside the library ---- */

/* The only public way to a message's DUP flag is the line the library logs before it hands the message over:
 * "Client ID received PUBLISH (d0, q1, …". */
static void note_publish(struct mqtt *mqtt, const char *text)
{
	static const char received[] = " received PUBLISH (d";
	size_t skip = strlen("Client ") + strlen(mqtt->client_id), flags = skip + sizeof received - 1;
	if (strlen(text) < flags + sizeof "0, q0" || memcmp(text + skip, received, sizeof received - 1) != 0)
		return;
	mqtt->duplicate = text[flags] == '1';
}

/* Loop thread, or the worker of a connect job; then the loop leaves all of this alone. */
static void on_log(struct mosquitto *client, void *context, int level, const char *text)
{
	struct mqtt *mqtt = context;
	if (level == MOSQ_LOG_DEBUG)
		note_publish(mqtt, text);
	if (level != MOSQ_LOG_ERR)
		return;
	SSL *tls = mosquitto_ssl_get(client); /* gone when the library has returned */
	if (tls != NULL)
		mqtt->verified = SSL_get_verify_result(tls);
	if (strncmp(mqtt->library, "Error: ", 7) != 0) /* OpenSSL's lines say less */
		snprintf(mqtt->library, sizeof mqtt->library, "%s", text);
}

static const char *refusal_remedy(int protocol, int reason)
{
	if ((protocol == 5 && reason == MQTT_RC_NOT_AUTHORIZED) || (protocol != 5 && reason == 5) ||
	    reason == MQTT_RC_BAD_USERNAME_OR_PASSWORD || (protocol != 5 && reason == 4))
		return "; check mqtt.username, mqtt.password and the broker's access rules";
	if (reason == MQTT_RC_UNSUPPORTED_PROTOCOL_VERSION || (protocol != 5 && reason == 1))
		return "; try mqtt.protocol 3.1.1";
	if (reason == MQTT_RC_SESSION_TAKEN_OVER)
		return "; another client uses the same client id: give each its own mqtt.client_id or state_dir";
	return "";
}

static void note_refusal(struct mqtt *mqtt, const char *what, int reason)
{
	int protocol = mqtt->config->protocol;
	const char *text = protocol == 5 ? mosquitto_reason_string(reason) : mosquitto_connack_string(reason);
	snprintf(mqtt->refusal, sizeof mqtt->refusal, "%s: %s (0x%02x)%s", what, text, (unsigned)reason,
	         refusal_remedy(protocol, reason));
}

static void read_granted(const struct mqtt *mqtt, int flags, const mosquitto_property *properties,
                         struct mqtt_granted *granted)
{
	uint16_t keepalive = (uint16_t)(mqtt->config->keepalive_ms / 1000), receive_maximum = UINT16_MAX;
	uint32_t expiry = mqtt->expiry_s;
	uint8_t maximum_qos = 2, shares = 1;
	mosquitto_property_read_int16(properties, MQTT_PROP_SERVER_KEEP_ALIVE, &keepalive, false);
	mosquitto_property_read_int16(properties, MQTT_PROP_RECEIVE_MAXIMUM, &receive_maximum, false);
	mosquitto_property_read_int32(properties, MQTT_PROP_SESSION_EXPIRY_INTERVAL, &expiry, false);
	mosquitto_property_read_byte(properties, MQTT_PROP_MAXIMUM_QOS, &maximum_qos, false);
	mosquitto_property_read_byte(properties, MQTT_PROP_SHARED_SUB_AVAILABLE, &shares, false);
	*granted = (struct mqtt_granted){
	    .session_present = flags & 1,
	    .keepalive_s = keepalive,
	    .session_expiry_s = mqtt->config->protocol == 5 ? (int64_t)expiry : -1,
	    .receive_maximum = receive_maximum,
	    .maximum_qos = maximum_qos,
	    .shares = shares != 0,
	};
}

static void log_granted(const struct mqtt *mqtt, const struct mqtt_granted *granted)
{
	if (mqtt->config->protocol == 5)
		log_write(level(mqtt, LOG_LEVEL_INFO), "mqtt",
		          "%s: connected to %s as %s, MQTT 5%s: session %s, expires after %lld s, keepalive %d s, "
		          "our receive maximum %d, the broker's %d",
		          mqtt->name, mqtt->address, mqtt->client_id, mqtt->config->tls.enabled ? " over TLS" : "",
		          granted->session_present ? "resumed" : "new", (long long)granted->session_expiry_s,
		          granted->keepalive_s, mqtt->config->receive_maximum, granted->receive_maximum);
	else
		log_write(
		    level(mqtt, LOG_LEVEL_INFO), "mqtt",
		    "%s: connected to %s as %s, MQTT 3.1.1%s: session %s, keepalive %d s; how many messages may be "
		    "unacknowledged and how long the session lasts is the broker's choice",
		    mqtt->name, mqtt->address, mqtt->client_id, mqtt->config->tls.enabled ? " over TLS" : "",
		    granted->session_present ? "resumed" : "new", granted->keepalive_s);
}

static void keepalive_tick(uv_timer_t *timer)
{
	struct mqtt *mqtt = container_of(timer, struct mqtt, keepalive);
	errno = 0;
	mqtt->in_library = true;
	int result = mosquitto_loop_misc(mqtt->client);
	int error = errno;
	mqtt->in_library = false;
	if (!over(mqtt, result, error) && flush(mqtt))
		update_poll(mqtt);
}

static void on_connect(struct mosquitto *client, void *context, int reason, int flags,
                       const mosquitto_property *properties)
{
	struct mqtt *mqtt = context;
	mqtt->activity++;
	if (reason != 0) {
		note_refusal(mqtt, "the broker refuses the connection", reason);
		return;
	}
	struct mqtt_granted granted;
	read_granted(mqtt, flags, properties, &granted);
	mqtt->state = UP;
	mqtt->up_at = uv_now(mqtt->loop);
	uv_timer_stop(&mqtt->timer);
	uv_timer_start(&mqtt->keepalive, keepalive_tick, KEEPALIVE_TICK_MS, KEEPALIVE_TICK_MS);
	log_repeat_end(&mqtt->complaint);
	log_granted(mqtt, &granted);
	if (!is_consumer(mqtt))
		listen_to_log(mqtt, false);
	if (mqtt->handler.up != NULL && !mqtt->closing)
		mqtt->handler.up(mqtt->owner, &granted);
}

static void on_disconnect(struct mosquitto *client, void *context, int reason, const mosquitto_property *properties)
{
	struct mqtt *mqtt = context;
	mqtt->activity++;
	if (mqtt->config->protocol == 5 && reason >= 0x80 && mqtt->refusal[0] == 0)
		note_refusal(mqtt, "disconnected by the broker", reason);
}

char *mqtt_user_property(const struct message *message, const char *name)
{
	const mosquitto_property *property = message->properties;
	bool again = false;
	/* Asked for no copies it returns NULL only where there is none. */
	while ((property = mosquitto_property_read_string_pair(property, MQTT_PROP_USER_PROPERTY, NULL, NULL, again)) !=
	       NULL) {
		char *found, *value;
		if (mosquitto_property_read_string_pair(property, MQTT_PROP_USER_PROPERTY, &found, &value, false) ==
		    NULL) {
			log_error("mqtt", "out of memory for a user property of a message");
			abort(); /* without it the message would get another _id */
		}
		/* 2.1 has NULL for an empty text. */
		bool wanted = strcmp(found != NULL ? found : "", name) == 0;
		free(found);
		if (wanted)
			return value != NULL ? value : memory_string("");
		free(value);
		again = true;
	}
	return NULL;
}

static void note_round(struct mqtt *mqtt, int qos, bool duplicate)
{
	if (mqtt->held == 0) {
		mqtt->held_at = uv_now(mqtt->loop);
		mqtt->round_acks = mqtt->round_repeats = false;
	}
	mqtt->round_acks = mqtt->round_acks || qos > 0;
	mqtt->round_repeats = mqtt->round_repeats || duplicate;
}

static void on_message(struct mosquitto *client, void *context, const struct mosquitto_message *received,
                       const mosquitto_property *properties)
{
	struct mqtt *mqtt = context;
	mqtt->activity++;
	bool duplicate = mqtt->duplicate;
	mqtt->duplicate = false;
	/* The gate relies on the PUBACK being queued by now and on nothing having sent it. */
	if (received->qos == 1 && !mosquitto_want_write(client)) {
		log_error("mqtt", "this libmosquitto acknowledges a message before it is handed over; "
		                  "stopping rather than losing messages: use libmosquitto 2.0 or 2.1");
		abort();
	}
	if (!is_consumer(mqtt))
		return;
	if (received->qos == 2)
		log_repeat(&mqtt->foreign, LOG_LEVEL_WARN, "mqtt",
		           "%s: the session holds messages of a QoS 2 subscription that another client has made under "
		           "this client id; a crash now could lose them",
		           mqtt->name);
	note_round(mqtt, received->qos, duplicate);
	mqtt->held++;
	mqtt->messages++;
	mqtt->queued++; /* its PUBACK */
	mqtt->phantom = false;
	if (mqtt->closing)
		return; /* held, so that the end sends nothing */
	struct message message = {
	    .topic = received->topic,
	    .topic_length = strlen(received->topic),
	    .payload = received->payload,
	    .payload_length = (size_t)received->payloadlen,
	    .qos = received->qos,
	    .retain = received->retain,
	    .dup = duplicate,
	    .user_property = mqtt_user_property,
	    .properties = properties,
	};
	mqtt->handler.message(mqtt->owner, &message);
}

static void on_subscribe(struct mosquitto *client, void *context, int id, int count, const int *granted,
                         const mosquitto_property *properties)
{
	struct mqtt *mqtt = context;
	mqtt->activity++;
	if (mqtt->handler.subscribed != NULL && !mqtt->closing)
		mqtt->handler.subscribed(mqtt->owner, count > 0 ? granted[0] : MQTT_RC_UNSPECIFIED);
}

static void on_unsubscribe(struct mosquitto *client, void *context, int id, const mosquitto_property *properties)
{
	struct mqtt *mqtt = context;
	mqtt->activity++;
	if (mqtt->handler.unsubscribed != NULL && !mqtt->closing)
		mqtt->handler.unsubscribed(mqtt->owner);
}

static void on_publish(struct mosquitto *client, void *context, int id, int reason,
                       const mosquitto_property *properties)
{
	struct mqtt *mqtt = context;
	mqtt->activity++;
	if (mqtt->handler.published != NULL && !mqtt->closing)
		mqtt->handler.published(mqtt->owner, id, reason);
}

/* ---- polling ---- */

/* True when the peer has closed its side and nothing is left to read. */
static bool peer_gone(int fd)
{
	char byte;
	ssize_t got = recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
	return got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR);
}

static SSL *tls_of(const struct mqtt *mqtt)
{
	return mqtt->client != NULL ? mosquitto_ssl_get(mqtt->client) : NULL;
}

static bool tls_pending(const struct mqtt *mqtt)
{
	SSL *tls = tls_of(mqtt);
	return tls != NULL && SSL_pending(tls) > 0;
}

/* One call of mosquitto_loop_read(). Returns true when there may be more to read at once. */
static bool read_once(struct mqtt *mqtt)
{
	uint64_t before = mqtt->activity;
	errno = 0;
	mqtt->in_library = true;
	int result = mosquitto_loop_read(mqtt->client, 1);
	int error = errno;
	mqtt->in_library = false;
	if (over(mqtt, result, error))
		return false;
	SSL *tls = tls_of(mqtt);
	if (tls != NULL && SSL_in_init(tls)) {
		if (peer_gone(mqtt->link->fd)) /* the library takes this for a handshake that goes on */
			fail(mqtt, "TLS failed: " NO_TLS);
		return false;
	}
	/* errno is EAGAIN after most packets, from the library's own full wake-up pipe; so only a call that brought
	 * nothing means that the socket is empty. */
	return error != EAGAIN || mqtt->activity != before || tls_pending(mqtt);
}

static void rest_over(uv_timer_t *timer)
{
	struct mqtt *mqtt = container_of(timer, struct mqtt, timer);
	mqtt->resting = false;
	if (!is_blocked(mqtt))
		read_burst(mqtt);
	if (mqtt->link != NULL && flush(mqtt))
		update_poll(mqtt);
}

static void rest(struct mqtt *mqtt, uint64_t ms)
{
	mqtt->resting = true;
	uv_timer_start(&mqtt->timer, rest_over, ms, 0);
}

/* It is to be read on. */
static void wait_for_more(struct mqtt *mqtt, bool some_came)
{
	bool fills = some_came && mqtt->held != 0; /* then nothing is written */
	if (fills)
		acknowledge_segments(mqtt->link);
	if (mqtt->state == UP && tls_pending(mqtt)) /* which no poll reports */
		rest(mqtt, 0);
	else if (fills && reading(mqtt) == MQTT_READ_SELDOM)
		rest(mqtt, REST_MS);
}

static void read_burst(struct mqtt *mqtt)
{
	struct link *link = mqtt->link;
	uint64_t generation = mqtt->generation, messages = mqtt->messages;
	uint64_t start = uv_hrtime();
	for (unsigned reads = 1; may_read(mqtt); reads++) {
		if (!read_once(mqtt))
			break;
		if (reads % CLOCK_EVERY == 0 && uv_hrtime() - start > BURST_MS * UINT64_C(1000000))
			break;
	}
	if (mqtt->link != link || mqtt->generation != generation || mqtt->state == CLOSING)
		return;
	bool more = mqtt->messages != messages;
	if (more && MQTT2MONGO_GATE_OPEN && !flush(mqtt))
		return;
	mqtt->in_burst = true;
	if (more && mqtt->handler.drained != NULL)
		mqtt->handler.drained(mqtt->owner);
	mqtt->in_burst = false;
	if (mqtt->link != NULL && !is_blocked(mqtt))
		wait_for_more(mqtt, more);
}

static int wanted_events(struct mqtt *mqtt)
{
	SSL *tls = tls_of(mqtt);
	if (tls != NULL && SSL_in_init(tls))
		return UV_READABLE | (SSL_want_write(tls) ? UV_WRITABLE : 0);
	bool waiting = gate_open(mqtt) && unsent(mqtt);
	if (!is_consumer(mqtt) || mqtt->state != UP)
		return UV_READABLE | (waiting ? UV_WRITABLE : 0);
	if (waiting)
		return UV_DISCONNECT | UV_WRITABLE;
	if (reading(mqtt) == MQTT_READ_NOTHING || mqtt->resting || !may_read(mqtt))
		return UV_DISCONNECT;
	return UV_READABLE;
}

static void drain_after_disconnect(struct mqtt *mqtt)
{
	char waste[4096];
	ssize_t got;
	do
		got = read(mqtt->link->fd, waste, sizeof waste);
	while (got > 0);
	if (got == 0 || (errno != EAGAIN && errno != EINTR))
		finish_close(mqtt);
}

static void send_disconnect(struct mqtt *mqtt);

static void on_poll(uv_poll_t *poll, int status, int events)
{
	struct link *link = container_of(poll, struct link, poll);
	struct mqtt *mqtt = link->mqtt;
	if (status < 0)
		mqtt->mask = 0; /* libuv has stopped the handle */
	if (mqtt->state == CLOSING) {
		if (mqtt->goodbye)
			drain_after_disconnect(mqtt);
		else
			send_disconnect(mqtt);
		return;
	}
	if ((events & UV_DISCONNECT) && mqtt->resting && !is_blocked(mqtt)) /* what came before the end */
		events |= UV_READABLE;
	if ((events & UV_DISCONNECT) && !(events & UV_READABLE)) {
		fail(mqtt, "connection lost: the broker hung up" SAME_ID);
		return;
	}
	if ((events & UV_WRITABLE) && !flush(mqtt))
		return;
	if ((events & (UV_READABLE | UV_WRITABLE) || status < 0) && !is_blocked(mqtt))
		read_burst(mqtt);
	if (mqtt->link != link)
		return;
	if (status < 0) {
		fail(mqtt, "connection lost: socket error" SAME_ID);
		return;
	}
	if (flush(mqtt)) /* CONNECT after a TLS handshake, SUBSCRIBE after CONNACK */
		update_poll(mqtt);
}

static void update_poll(struct mqtt *mqtt)
{
	if (mqtt->link == NULL || mqtt->state == CLOSING)
		return;
	int mask = wanted_events(mqtt);
	if (mask == mqtt->mask)
		return;
	mqtt->mask = mask;
	uv_poll_start(&mqtt->link->poll, mask, on_poll);
}

/* ---- connecting ---- */

static int no_passphrase(char *buffer, int size, int writing, void *context)
{
	return 0; /* never ask on a terminal: an encrypted key fails with OpenSSL's message */
}

static int set_tls(struct mosquitto *client, const struct config_tls *tls)
{
	const char *directory = NULL;
	if (tls->ca == NULL) {
		directory = getenv(X509_get_default_cert_dir_env());
		if (directory == NULL)
			directory = X509_get_default_cert_dir();
	}
	int result = MOSQ_ERR_SUCCESS;
	if (tls->ca == NULL)
		result = mosquitto_int_option(client, MOSQ_OPT_TLS_USE_OS_CERTS, 1);
	if (result == MOSQ_ERR_SUCCESS)
		result = mosquitto_tls_set(client, tls->ca, directory, tls->cert, tls->key, no_passphrase);
	if (result == MOSQ_ERR_SUCCESS && tls->insecure)
		result = mosquitto_tls_insecure_set(client, true);
	return result;
}

static int set_options(struct mosquitto *client, const struct config_mqtt *config)
{
	const struct {
		enum mosq_opt_t option;
		int value;
	} options[] = {
	    {MOSQ_OPT_PROTOCOL_VERSION, config->protocol == 5 ? MQTT_PROTOCOL_V5 : MQTT_PROTOCOL_V311},
	    {MOSQ_OPT_RECEIVE_MAXIMUM, config->receive_maximum},
	    {MOSQ_OPT_SEND_MAXIMUM, SEND_MAXIMUM},
	    {MOSQ_OPT_TCP_NODELAY, 1},
	};
	int result = mosquitto_threaded_set(client, true); /* packets leave only in mosquitto_loop_write() */
	for (size_t i = 0; i < sizeof options / sizeof *options && result == MOSQ_ERR_SUCCESS; i++)
		result = mosquitto_int_option(client, options[i].option, options[i].value);
	return result;
}

static int configure_client(struct mqtt *mqtt)
{
	const struct config_mqtt *config = mqtt->config;
	struct mosquitto *client = mqtt->client;
	mosquitto_connect_v5_callback_set(client, on_connect);
	mosquitto_disconnect_v5_callback_set(client, on_disconnect);
	mosquitto_message_v5_callback_set(client, on_message);
	mosquitto_subscribe_v5_callback_set(client, on_subscribe);
	mosquitto_unsubscribe_v5_callback_set(client, on_unsubscribe);
	mosquitto_publish_v5_callback_set(client, on_publish);
	int result = set_options(client, config);
	if (result == MOSQ_ERR_SUCCESS && (config->username != NULL || config->password != NULL))
		result = mosquitto_username_pw_set(client, config->username, config->password);
	if (result == MOSQ_ERR_SUCCESS && config->tls.enabled)
		result = set_tls(client, &config->tls);
	return result;
}

static bool make_client(struct mqtt *mqtt)
{
	if (mqtt->client != NULL)
		return true;
	mqtt->client = mosquitto_new(mqtt->client_id, mqtt->clean_start, mqtt);
	if (mqtt->client == NULL) {
		fail(mqtt, errno == EINVAL ? "the client id is not valid; check mqtt.client_id" : strerror(errno));
		return false;
	}
	int result = configure_client(mqtt);
	if (result == MOSQ_ERR_SUCCESS)
		return true;
	char why[REASON_TEXT];
	snprintf(why, sizeof why, "cannot set the connection up: %s; check mqtt.username, mqtt.password and mqtt.tls.*",
	         mosquitto_strerror(result));
	drop_client(mqtt);
	fail(mqtt, why);
	return false;
}

/* An attempt that could not be stopped has come back: end it now. True when there was a reason to. */
static bool attempt_ended(struct mqtt *mqtt)
{
	if (mqtt->closing) {
		finish_close(mqtt);
		return true;
	}
	if (mqtt->doomed[0] == 0)
		return false;
	fail(mqtt, mqtt->doomed);
	return true;
}

static void adopt_socket(struct mqtt *mqtt)
{
	int fd = fcntl(mosquitto_socket(mqtt->client), F_DUPFD_CLOEXEC, 0);
	if (fd < 0) {
		fail(mqtt, strerror(errno));
		return;
	}
	struct link *link = memory_zeroed(1, sizeof *link);
	*link = (struct link){.fd = fd, .mqtt = mqtt};
	int result = uv_poll_init(mqtt->loop, &link->poll, fd);
	if (result != 0) {
		close(fd);
		free(link);
		fail(mqtt, uv_strerror(result));
		return;
	}
	mqtt->handles++;
	mqtt->link = link;
	mqtt->mask = 0;
	mqtt->state = HANDSHAKE;
	mqtt->generation++;
	if (flush(mqtt))
		update_poll(mqtt);
}

/* The library sets OpenSSL up for itself without a lock, the first time a client connects over TLS. */
static pthread_mutex_t tls_setup = PTHREAD_MUTEX_INITIALIZER;
static bool tls_ready; /* under the mutex */

/* True when the caller is the one to connect first, and then holds the mutex. */
static bool begin_tls_setup(const struct config_tls *tls)
{
	if (!tls->enabled)
		return false;
	pthread_mutex_lock(&tls_setup);
	if (tls_ready)
		pthread_mutex_unlock(&tls_setup);
	return !tls_ready;
}

static void end_tls_setup(bool connected)
{
	tls_ready = tls_ready || connected;
	pthread_mutex_unlock(&tls_setup);
}

/* Worker thread. The loop leaves the client alone until connect_done(). */
static void connect_work(uv_work_t *job)
{
	struct mqtt *mqtt = container_of(job, struct mqtt, job);
	const struct config_mqtt *config = mqtt->config;
	/* TLS checks the certificate against the name it is given here. */
	const char *host = config->tls.enabled ? config->host : mqtt->numeric;
	bool first = begin_tls_setup(&config->tls);
	errno = 0;
	mqtt->job_result = mosquitto_connect_bind_v5(mqtt->client, host, config->port,
	                                             (int)(config->keepalive_ms / 1000), NULL, mqtt->asked);
	mqtt->job_errno = errno;
	if (first)
		end_tls_setup(mqtt->job_result == MOSQ_ERR_SUCCESS);
}

static void connect_done(uv_work_t *job, int status)
{
	struct mqtt *mqtt = container_of(job, struct mqtt, job);
	mosquitto_property_free_all(&mqtt->asked);
	if (attempt_ended(mqtt))
		return;
	if (status < 0 || mqtt->job_result != MOSQ_ERR_SUCCESS) {
		char why[REASON_TEXT + 64];
		describe_loss(mqtt, mqtt->job_result, mqtt->job_errno, why, sizeof why);
		fail(mqtt, why);
		return;
	}
	adopt_socket(mqtt);
}

static bool add_expiry(mosquitto_property **properties, int64_t seconds)
{
	return mosquitto_property_add_int32(properties, MQTT_PROP_SESSION_EXPIRY_INTERVAL, (uint32_t)seconds) ==
	       MOSQ_ERR_SUCCESS;
}

static void start_job(struct mqtt *mqtt)
{
	const struct config_mqtt *config = mqtt->config;
	mqtt->state = CONNECTING;
	mqtt->library[0] = 0;
	if (!make_client(mqtt))
		return;
	/* Connected without it the session, and what the broker has queued for it, would end with the connection. */
	if (config->protocol == 5 && !mqtt->clean_start && !add_expiry(&mqtt->asked, mqtt->expiry_s)) {
		fail(mqtt, "out of memory: cannot ask for mqtt.session_expiry, so not connecting");
		return;
	}
	listen_to_log(mqtt, true); /* also for what goes wrong */
	uv_queue_work(mqtt->loop, &mqtt->job, connect_work, connect_done);
}

static void connect_timed_out(uv_timer_t *timer);
static void probe_next(struct mqtt *mqtt);

static void probe_closed(uv_handle_t *handle)
{
	struct probe *probe = container_of(handle, struct probe, tcp);
	struct mqtt *mqtt = probe->mqtt;
	free(probe);
	mqtt->handles--;
	tell_when_closed(mqtt);
}

static void drop_probe(struct mqtt *mqtt)
{
	if (mqtt->probe != NULL)
		uv_close((uv_handle_t *)&mqtt->probe->tcp, probe_closed);
	mqtt->probe = NULL;
}

static void forget_addresses(struct mqtt *mqtt)
{
	uv_freeaddrinfo(mqtt->addresses);
	mqtt->addresses = mqtt->next_address = NULL;
}

static void probe_failed(struct mqtt *mqtt, const char *why)
{
	drop_probe(mqtt);
	mqtt->next_address = mqtt->next_address->ai_next;
	if (mqtt->next_address != NULL) {
		probe_next(mqtt);
		return;
	}
	forget_addresses(mqtt);
	char text[REASON_TEXT];
	snprintf(text, sizeof text, "cannot connect: %s; is the broker running, and are mqtt.host and mqtt.port right?",
	         why);
	fail(mqtt, text);
}

static uint64_t time_left(const struct mqtt *mqtt)
{
	uint64_t now = uv_now(mqtt->loop);
	return mqtt->deadline > now ? mqtt->deadline - now : 1;
}

static void probe_answered(uv_connect_t *request, int status)
{
	struct probe *probe = container_of(request, struct probe, request);
	struct mqtt *mqtt = probe->mqtt;
	if (mqtt->probe != probe) /* given up meanwhile */
		return;
	if (status < 0) {
		probe_failed(mqtt, uv_strerror(status));
		return;
	}
	int result = getnameinfo(mqtt->next_address->ai_addr, mqtt->next_address->ai_addrlen, mqtt->numeric,
	                         sizeof mqtt->numeric, NULL, 0, NI_NUMERICHOST);
	if (result != 0) {
		probe_failed(mqtt, gai_strerror(result));
		return;
	}
	drop_probe(mqtt);
	uv_timer_start(&mqtt->timer, connect_timed_out, time_left(mqtt), 0);
	forget_addresses(mqtt);
	start_job(mqtt);
}

/* Its fair share of the time that is left: one dead address must not starve the others. */
static uint64_t probe_share(const struct mqtt *mqtt)
{
	unsigned left = 1;
	for (const struct addrinfo *address = mqtt->next_address->ai_next; address != NULL; address = address->ai_next)
		left++;
	return time_left(mqtt) / left + 1;
}

static void probe_next(struct mqtt *mqtt)
{
	struct probe *probe = memory_zeroed(1, sizeof *probe);
	probe->mqtt = mqtt;
	mqtt->state = PROBING;
	mqtt->probe = probe;
	mqtt->handles++;
	uv_tcp_init(mqtt->loop, &probe->tcp);
	uv_timer_start(&mqtt->timer, connect_timed_out, probe_share(mqtt), 0);
	int result = uv_tcp_connect(&probe->request, &probe->tcp, mqtt->next_address->ai_addr, probe_answered);
	if (result != 0)
		probe_failed(mqtt, uv_strerror(result));
}

static void on_resolved(uv_getaddrinfo_t *request, int status, struct addrinfo *addresses)
{
	struct mqtt *mqtt = container_of(request, struct mqtt, resolve);
	mqtt->addresses = mqtt->next_address = addresses;
	if (status == 0 && !mqtt->closing && mqtt->doomed[0] == 0) {
		probe_next(mqtt);
		return;
	}
	forget_addresses(mqtt);
	if (attempt_ended(mqtt))
		return;
	char why[REASON_TEXT];
	snprintf(why, sizeof why, "cannot resolve the name: %s; check mqtt.host", uv_strerror(status));
	fail(mqtt, why);
}

static void connect_timed_out(uv_timer_t *timer)
{
	struct mqtt *mqtt = container_of(timer, struct mqtt, timer);
	switch (mqtt->state) {
	case RESOLVING: /* the resolver's thread cannot be stopped, only waited for */
		doom(mqtt, "name resolution did not answer within mqtt.connect_timeout");
		log_repeat(&mqtt->complaint, level(mqtt, LOG_LEVEL_WARN), "mqtt", "%s: %s: %s", mqtt->name,
		           mqtt->address, mqtt->doomed);
		uv_cancel((uv_req_t *)&mqtt->resolve);
		break;
	case PROBING:
		probe_failed(mqtt, "no answer within mqtt.connect_timeout");
		break;
	case CONNECTING:
		doom(mqtt, "no answer within mqtt.connect_timeout");
		break;
	case HANDSHAKE:
		fail(mqtt, mqtt->config->tls.enabled && tls_of(mqtt) != NULL && SSL_in_init(tls_of(mqtt))
		               ? "the TLS handshake did not finish within mqtt.connect_timeout"
		               : "the broker took the connection but sent no CONNACK within mqtt.connect_timeout");
		break;
	default:
		break;
	}
}

static void start_attempt(uv_timer_t *timer)
{
	struct mqtt *mqtt = container_of(timer, struct mqtt, timer);
	struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM};
	char port[8];
	snprintf(port, sizeof port, "%d", mqtt->config->port);
	uv_update_time(mqtt->loop);
	mqtt->state = RESOLVING;
	mqtt->refusal[0] = 0;
	mqtt->verified = X509_V_OK;
	mqtt->deadline = uv_now(mqtt->loop) + (uint64_t)mqtt->config->connect_timeout_ms;
	uv_timer_start(&mqtt->timer, connect_timed_out, (uint64_t)mqtt->config->connect_timeout_ms, 0);
	int result = uv_getaddrinfo(mqtt->loop, &mqtt->resolve, on_resolved, mqtt->config->host, port, &hints);
	if (result != 0)
		fail(mqtt, uv_strerror(result));
}

/* Doubling with every failure in a row, and a random half of it, so that many clients do not come back as one. */
static uint64_t reconnect_delay(const struct mqtt *mqtt)
{
	if (mqtt->failures == 0)
		return 0;
	uint64_t delay = backoff_ms(mqtt->failures, (uint64_t)mqtt->config->reconnect_min_ms,
	                            (uint64_t)mqtt->config->reconnect_max_ms);
	uint32_t random = 0;
	uv_random(NULL, NULL, &random, sizeof random, 0, NULL);
	return delay / 2 + random % (delay / 2 + 1);
}

/* ---- public ---- */

struct mqtt *mqtt_create(uv_loop_t *loop, const struct mqtt_options *options, const struct mqtt_handler *handler,
                         void *owner)
{
	struct mqtt *mqtt = memory_zeroed(1, sizeof *mqtt);
	mqtt->loop = loop;
	mqtt->config = options->config;
	mqtt->handler = *handler;
	mqtt->owner = owner;
	mqtt->client_id = memory_string(options->client_id);
	mqtt->address = memory_format("%s:%d", options->config->host, options->config->port);
	mqtt->name = options->name;
	mqtt->clean_start = options->clean_start;
	if (!options->clean_start)
		mqtt->expiry_s =
		    options->brief_s > 0 ? options->brief_s : (uint32_t)(options->config->session_expiry_ms / 1000);
	mqtt->keep_client = options->keep_client;
	mqtt->quiet = options->quiet;
	uv_timer_init(loop, &mqtt->timer);
	uv_timer_init(loop, &mqtt->keepalive);
	mqtt->handles = 2;
	return mqtt;
}

void mqtt_connect(struct mqtt *mqtt)
{
	if (mqtt->state != IDLE || mqtt->closing)
		return;
	mqtt->state = BACKOFF;
	uv_timer_start(&mqtt->timer, start_attempt, reconnect_delay(mqtt), 0);
}

static void give_up_over(struct mqtt *mqtt, const char *what, int result)
{
	char why[REASON_TEXT];
	snprintf(why, sizeof why, "cannot %s: %s", what, mosquitto_strerror(result));
	mqtt_give_up(mqtt, why);
}

void mqtt_subscribe(struct mqtt *mqtt, const char *filter, int qos)
{
	if (mqtt->state != UP || mqtt->closing)
		return;
	int result = mosquitto_subscribe_v5(mqtt->client, NULL, filter, qos, MQTT_SUB_OPT_SEND_RETAIN_NEW, NULL);
	if (result != MOSQ_ERR_SUCCESS)
		give_up_over(mqtt, "subscribe", result);
}

bool mqtt_unsubscribe(struct mqtt *mqtt, const char *filter)
{
	if (mqtt->state != UP || mqtt->closing)
		return false;
	int result = mosquitto_unsubscribe_v5(mqtt->client, NULL, filter, NULL);
	if (result == MOSQ_ERR_INVAL || result == MOSQ_ERR_MALFORMED_UTF8 || result == MOSQ_ERR_OVERSIZE_PACKET)
		return false;
	if (result != MOSQ_ERR_SUCCESS)
		give_up_over(mqtt, "unsubscribe", result); /* so that it stays unanswered, and is sent again */
	return true;
}

int mqtt_publish(struct mqtt *mqtt, const char *topic, const void *payload, size_t length, int qos)
{
	int id = 0;
	if (mqtt->state != UP || mqtt->closing)
		return 0;
	mqtt->queued++;
	mqtt->phantom = false;
	int result = mosquitto_publish_v5(mqtt->client, &id, topic, (int)length, payload, qos, false, NULL);
	if (result == MOSQ_ERR_SUCCESS)
		return id;
	log_repeat(&mqtt->complaint, LOG_LEVEL_WARN, "mqtt", "%s: cannot publish to %s: %s", mqtt->name, topic,
	           mosquitto_strerror(result));
	return 0;
}

uint64_t mqtt_generation(const struct mqtt *mqtt)
{
	return mqtt->generation;
}

bool mqtt_is_up(const struct mqtt *mqtt)
{
	return mqtt->state == UP;
}

bool mqtt_was_refused(const struct mqtt *mqtt)
{
	return mqtt->refusal[0] != 0;
}

const char *mqtt_address(const struct mqtt *mqtt)
{
	return mqtt->address;
}

void mqtt_give_up(struct mqtt *mqtt, const char *why)
{
	if (mqtt->in_library)
		doom(mqtt, why); /* as soon as the library has returned */
	else if (mqtt->state == HANDSHAKE || mqtt->state == UP)
		fail(mqtt, why);
}

/* ---- closing ---- */

/* After each handle that has closed. One of an earlier connection, or a probe, may do so while a job of the next one
 * runs: only finish_close() ends the client. */
static void tell_when_closed(struct mqtt *mqtt)
{
	if (mqtt->state == CLOSED && mqtt->handles == 0)
		mqtt->closed(mqtt->owner); /* may free it */
}

void mqtt_free(struct mqtt *mqtt)
{
	if (mqtt->state != CLOSED || mqtt->handles > 0)
		abort(); /* libuv would go on using it */
	free(mqtt->client_id);
	free(mqtt->address);
	free(mqtt);
}

static void handle_closed(uv_handle_t *handle)
{
	struct mqtt *mqtt = handle->data;
	mqtt->handles--;
	tell_when_closed(mqtt);
}

/* While closing: no job of ours runs any more. The owner may close from handler->down, so what ended the connection may
 * come here a second time. */
static void finish_close(struct mqtt *mqtt)
{
	if (mqtt->state == CLOSED)
		return;
	drop_connection(mqtt);
	drop_client(mqtt);
	mqtt->state = CLOSED;
	mqtt->timer.data = mqtt->keepalive.data = mqtt;
	uv_close((uv_handle_t *)&mqtt->timer, handle_closed);
	uv_close((uv_handle_t *)&mqtt->keepalive, handle_closed);
}

static void close_timed_out(uv_timer_t *timer)
{
	finish_close(container_of(timer, struct mqtt, timer));
}

/* Write what is queued and DISCONNECT behind it. Then 2.0 closes its descriptor, and ours remains; 2.1 shuts the socket
 * down for writing and keeps the packet queued, so that the queue says nothing. What has not left yet is told by the
 * kernel's EAGAIN alone. */
static void send_disconnect(struct mqtt *mqtt)
{
	errno = 0;
	mqtt->in_library = true;
	int result = mosquitto_loop_write(mqtt->client, 1);
	int error = errno;
	mqtt->in_library = false;
	mqtt->goodbye = mosquitto_socket(mqtt->client) == -1 || (error != EAGAIN && error != EINTR);
	if (result != MOSQ_ERR_SUCCESS) {
		finish_close(mqtt);
	} else if (mqtt->goodbye) {
		/* Closing with unread PUBLISHes would send a reset, which may destroy PUBACKs under way: say that we
		 * are done, and read what still comes until the broker hangs up. */
		shutdown(mqtt->link->fd, SHUT_WR);
		uv_poll_start(&mqtt->link->poll, UV_READABLE, on_poll);
	} else {
		uv_poll_start(&mqtt->link->poll, UV_WRITABLE, on_poll);
	}
}

/* False: it is not queued, for want of memory. */
static bool queue_disconnect(struct mqtt *mqtt)
{
	mosquitto_property *properties = NULL;
	bool ends = mqtt->ends_session && mqtt->config->protocol == 5;
	bool queued = (!ends || add_expiry(&properties, 0)) &&
	              mosquitto_disconnect_v5(mqtt->client, 0, properties) == MOSQ_ERR_SUCCESS;
	mosquitto_property_free_all(&properties);
	return queued;
}

static void close_gracefully(struct mqtt *mqtt)
{
	if (mqtt->state != UP || mqtt->held != 0 || mqtt->link == NULL) {
		finish_close(mqtt);
		return;
	}
	mqtt->state = CLOSING;
	uv_timer_stop(&mqtt->keepalive);
	uv_timer_start(&mqtt->timer, close_timed_out, is_consumer(mqtt) ? CLOSE_CONSUMER_MS : CLOSE_MS, 0);
	if (queue_disconnect(mqtt)) {
		send_disconnect(mqtt);
		return;
	}
	log_write(level(mqtt, LOG_LEVEL_WARN), "mqtt", "%s: %s: out of memory: closed without DISCONNECT", mqtt->name,
	          mqtt->address);
	finish_close(mqtt);
}

void mqtt_close_session(struct mqtt *mqtt, void (*closed)(void *owner))
{
	mqtt->ends_session = true;
	mqtt_close(mqtt, closed);
}

void mqtt_close(struct mqtt *mqtt, void (*closed)(void *owner))
{
	bool again = mqtt->closing;
	mqtt->closing = true;
	mqtt->closed = closed;
	if (mqtt->in_library)
		return; /* over() goes on */
	if (again && mqtt->state == CLOSING)
		finish_close(mqtt);
	if (again)
		return;
	switch (mqtt->state) {
	case RESOLVING:
		uv_cancel((uv_req_t *)&mqtt->resolve);
		return; /* on_resolved() goes on */
	case CONNECTING:
		return; /* connect_done() goes on */
	case PROBING:
		drop_probe(mqtt);
		forget_addresses(mqtt);
		finish_close(mqtt);
		return;
	default:
		close_gracefully(mqtt);
	}
}
