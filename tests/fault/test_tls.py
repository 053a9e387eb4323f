"""Certificates that expire, name another host, or are revoked.

Fault: under a steady stream the broker comes back with an expired certificate, with one for another host, and with a list that revokes
the service's own certificate; each time for a few seconds, and then as it was.
Proof: each time the service says what is wrong, and is not connected; it is the broker that refuses the revoked one, by its log.
Held: the broker keeps the messages meanwhile, and the service takes them up by itself; it gives each attempt time, and does not end;
the oracle. Figure: messages, faults, lost (0), duplicates.
"""

import pytest

from oracle import SUBSCRIBED, pause, scaled
from processes import wait_until


@pytest.mark.timeout(scaled(120, 300))
def test_certificates(scene, certificates, tmp_path):
    lasts = scaled(2, 10)
    ours = certificates.issue("ours")
    it = scene(broker={"tls": certificates, "require_certificate": True}, **{
        "mqtt.tls.enabled": "true", "mqtt.tls.ca": certificates.ca.cert, "mqtt.tls.cert": ours.cert, "mqtt.tls.key": ours.key})
    pid, right, extra = it.running.pid, it.broker.certificate, list(it.broker.extra)

    def restart(certificate=right, more=()):
        it.broker.certificate, it.broker.extra = certificate, extra + list(more)
        lost = stream.lost
        it.broker.stop()
        wait_until(lambda: stream.lost > lost, what="the publisher notices")
        mark, brokers = it.running.mark(), it.broker.mark()
        it.broker.start()
        return mark, brokers

    faults = 0
    with it.stream(pace=1000) as stream:
        for certificate, more, said, by_broker in (
                (certificates.expired, (), "TLS failed: certificate verify failed.*expired", None),
                (certificates.wrong, (), "TLS failed: the certificate is for another host name; set mqtt.host", None),
                (right, [f"crlfile {certificates.revocation_list(ours)}"], "(TLS|certificate).*(revoked|mqtt.tls.cert)", "certificate verify failed")):
            stream.wait(len(stream.acknowledged) + 1000)
            mark, brokers = restart(certificate, more)
            it.running.wait_log(said, timeout=20, after=mark)
            if by_broker:
                it.broker.wait_log(by_broker, timeout=20, after=brokers)
            pause(lasts)
            assert SUBSCRIBED not in it.running.log[mark:] and it.running.alive
            faults += 1
            mark, _ = restart()
            it.running.wait_log(SUBSCRIBED, timeout=30, after=mark)
        stream.wait(len(stream.acknowledged) + 1000)
        acknowledged = stream.finish()
    assert it.running.pid == pid and it.running.alive
    it.conclude("tls", acknowledged, faults=faults, publisher_lost=stream.lost)
