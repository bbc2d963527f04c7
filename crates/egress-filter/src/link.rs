//! The filter in front of a link.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use alveole_guest_memory::GuestBuffers;
use alveole_net_link::{Frame, HEADER_BYTES, LinkQueue, NetLink, Offloads, Received, Sent};

use crate::frame::{Content, Packet, Transport, Unreadable, leaves_headers, read};
use crate::heard::{Heard, Peer, Speech};
use crate::policy::{NEIGHBOUR_ADVERTISEMENT, NEIGHBOUR_SOLICITATION, Policy, Verdict};
use crate::{EgressCounters, HEAD_BYTES, MAX_LOG_LINES, MAX_WAITING_REFUSALS, refusal};

/// Header of the link and what is looked at behind it.
const START_BYTES: usize = HEADER_BYTES + HEAD_BYTES;
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST6: u8 = 128;
const ECHO_REPLY6: u8 = 129;

/// Puts `policy` in front of a link: what the guest sends against it is dropped, counted, and where that is proper answered by
/// an ICMP error.
///
/// # Errors
/// The host's kernel serves the link (vhost), so that no frame comes by here.
pub fn filter(link: NetLink, policy: Policy, counters: Arc<EgressCounters>) -> io::Result<NetLink> {
    if !link.vhost.is_empty() {
        return Err(io::Error::other(
            "rules for what a guest sends see no frame of an interface that the host's kernel serves; give this one without vhost",
        ));
    }
    let filter = Arc::new(Filter::new(policy, counters));
    let queues = link.queues.into_iter().map(|inner| {
        Box::new(Filtered {
            inner,
            filter: filter.clone(),
            rest: None,
        }) as Box<dyn LinkQueue>
    });
    Ok(NetLink {
        facts: link.facts,
        queues: queues.collect(),
        vhost: Vec::new(),
    })
}

/// One for all queues of an interface: a guest may answer by another queue than that by which it was asked.
struct Filter {
    policy: Policy,
    counters: Arc<EgressCounters>,
    heard: Mutex<Heard>,
    refusals: Mutex<VecDeque<Vec<u8>>>,
    has_refusals: AtomicBool,
    lines: AtomicU64,
}

struct Filtered {
    inner: Box<dyn LinkQueue>,
    filter: Arc<Filter>,
    /// What is behind the headers of the frame at hand; kept for its allocation.
    rest: Option<GuestBuffers>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Filter {
    fn new(policy: Policy, counters: Arc<EgressCounters>) -> Self {
        Self {
            policy,
            counters,
            heard: Mutex::default(),
            refusals: Mutex::default(),
            has_refusals: AtomicBool::new(false),
            lines: AtomicU64::new(0),
        }
    }

    /// Whether a frame of `len` bytes may be sent, that begins with `start`: the link's header and some bytes of the frame.
    fn passes(&self, start: &[u8], len: usize) -> bool {
        let Some((offloads, head)) = start.split_first_chunk::<HEADER_BYTES>() else {
            return false;
        };
        let content = match read(head, len) {
            Ok(content) if leaves_headers(offloads, &content) => content,
            Ok(_) => {
                self.counters.malformed.inc();
                self.say(format_args!(
                    "a frame is dropped: its checksum would be written over its headers"
                ));
                return false;
            }
            Err(why) => {
                self.count(why);
                return false;
            }
        };
        let Content::Packet(packet) = content else {
            return true;
        };
        match self.policy.judge(&packet) {
            Verdict::Pass => return true,
            Verdict::Refuse if self.is_answer(&packet) => {
                self.counters.answers.inc();
                return true;
            }
            Verdict::Refuse | Verdict::Never => {}
        }
        self.counters.denied.inc();
        self.say(format_args!("{} is refused", Shown(&packet)));
        self.refuse(head, &packet);
        false
    }

    fn count(&self, why: Unreadable) {
        let (counter, why) = match why {
            Unreadable::Malformed(why) => (&self.counters.malformed, why),
            Unreadable::Fragment => (
                &self.counters.fragments,
                "it is a part of a packet, which has no ports to be judged by",
            ),
            Unreadable::Unknown(why) => (&self.counters.unreadable, why),
        };
        counter.inc();
        self.say(format_args!("a frame is dropped: {why}"));
    }

    fn say(&self, what: std::fmt::Arguments<'_>) {
        use alveole_counters::CounterSet;
        let line = self.lines.fetch_add(1, Ordering::Relaxed);
        if line < MAX_LOG_LINES {
            log::info!("{}: {what}", self.counters.name());
        } else if line == MAX_LOG_LINES {
            log::info!("{}: further ones are only counted", self.counters.name());
        }
    }

    fn refuse(&self, head: &[u8], packet: &Packet) {
        let mut refusals = lock(&self.refusals);
        if refusals.len() >= MAX_WAITING_REFUSALS {
            return;
        }
        refusals.extend(refusal::tell(head, packet));
        self.has_refusals
            .store(!refusals.is_empty(), Ordering::Release);
    }

    fn give(&self) -> Option<Vec<u8>> {
        if !self.has_refusals.load(Ordering::Acquire) {
            return None;
        }
        let mut refusals = lock(&self.refusals);
        let frame = refusals.pop_front();
        self.has_refusals
            .store(!refusals.is_empty(), Ordering::Release);
        frame
    }

    /// Whether it goes to who began to talk to the guest.
    fn is_answer(&self, packet: &Packet) -> bool {
        let (speech, port, guest_port) = match packet.transport {
            // One that asks for a connection answers nobody.
            Transport::Tcp { opens: true, .. } => return false,
            Transport::Tcp { from, to, .. } => (Speech::Tcp, to, from),
            Transport::Udp { from, to } => (Speech::Udp, to, from),
            Transport::Icmp { kind, id } => match (packet.destination.is_ipv4(), kind) {
                (true, ECHO_REPLY) | (false, ECHO_REPLY6) => (Speech::Echo, 0, id),
                (false, NEIGHBOUR_SOLICITATION | NEIGHBOUR_ADVERTISEMENT)
                    if packet.hop_limit == u8::MAX =>
                {
                    (Speech::Neighbour, 0, 0)
                }
                _ => return false,
            },
            Transport::Other(_) => return false,
        };
        let peer = Peer {
            speech,
            address: packet.destination,
            port,
            guest_port,
        };
        lock(&self.heard).may_answer(peer, Instant::now())
    }

    /// Notes who begins to talk to the guest. `start` is what the link gave, not what is in guest memory.
    fn hear(&self, start: &[u8], len: u64) {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let start = start.get(..len).unwrap_or(start);
        let head = start.get(HEADER_BYTES..).unwrap_or(&[]);
        let Ok(Content::Packet(packet)) = read(head, len.saturating_sub(HEADER_BYTES)) else {
            return;
        };
        let (speech, port, guest_port) = match packet.transport {
            Transport::Tcp {
                from,
                to,
                opens: true,
            } => (Speech::Tcp, from, to),
            Transport::Udp { from, to } => (Speech::Udp, from, to),
            Transport::Icmp { kind, id } => match (packet.source.is_ipv4(), kind) {
                (true, ECHO_REQUEST) | (false, ECHO_REQUEST6) => (Speech::Echo, 0, id),
                (false, NEIGHBOUR_SOLICITATION | NEIGHBOUR_ADVERTISEMENT)
                    if packet.hop_limit == u8::MAX =>
                {
                    (Speech::Neighbour, 0, 0)
                }
                _ => return,
            },
            _ => return,
        };
        let peer = Peer {
            speech,
            address: packet.source,
            port,
            guest_port,
        };
        if self.policy.judge(&packet.answered()) != Verdict::Refuse {
            return;
        }
        if lock(&self.heard).note(peer, Instant::now()) {
            self.counters.peers_forgotten.inc();
        }
    }
}

/// A packet in a line of the log.
struct Shown<'a>(&'a Packet);

impl std::fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let to = self.0.destination;
        match self.0.transport {
            Transport::Tcp { to: port, .. } => write!(f, "tcp to {to} port {port}"),
            Transport::Udp { to: port, .. } => write!(f, "udp to {to} port {port}"),
            Transport::Icmp { kind, .. } => write!(f, "icmp of type {kind} to {to}"),
            Transport::Other(protocol) => write!(f, "protocol {protocol} to {to}"),
        }
    }
}

impl LinkQueue for Filtered {
    fn send(&mut self, frame: Frame<'_>) -> io::Result<Sent> {
        let mut copy = [0; START_BYTES];
        let given = frame.start.len();
        let rest = usize::try_from(frame.rest.len_bytes()).unwrap_or(usize::MAX);
        let len = usize::try_from(frame.len_bytes()).unwrap_or(usize::MAX);
        let Some((begin, more)) = copy.split_at_mut_checked(given) else {
            // Somebody has copied more than is looked at.
            return if self.filter.passes(frame.start, len) {
                self.inner.send(frame)
            } else {
                Ok(Sent::Done)
            };
        };
        begin.copy_from_slice(frame.start);
        let copied = more.len().min(rest);
        frame
            .rest
            .copy_to(0, more.get_mut(..copied).unwrap_or(&mut []));
        let start = copy.get(..given.saturating_add(copied)).unwrap_or(&copy);
        if !self.filter.passes(start, len) {
            return Ok(Sent::Done);
        }
        // What was judged is what is sent, whatever the guest has made of it by now.
        let rest = match &mut self.rest {
            Some(rest) => rest,
            none => none.insert(frame.rest.part(0, 0)),
        };
        rest.set_rest(frame.rest, copied as u64);
        self.inner.send(Frame { start, rest })
    }

    fn flush(&mut self) -> io::Result<bool> {
        self.inner.flush()
    }

    /// Refusals first. Nothing tells of them by [`Self::readable_fd`]: they come of frames that the guest has sent, and whoever
    /// sends for a guest looks for frames to it afterwards.
    fn receive(&mut self, into: &GuestBuffers) -> io::Result<Received> {
        let Some(frame) = self.filter.give() else {
            let mut start = [0; START_BYTES];
            let received = self.inner.receive_seen(&mut start, into)?;
            if let Received::Frame(len) = received {
                self.filter.hear(&start, len);
            }
            return Ok(received);
        };
        Ok(Received::own(&frame, into))
    }

    fn receive_kept(&mut self, into: &mut [u8]) -> io::Result<Received> {
        let Some(frame) = self.filter.give() else {
            let received = self.inner.receive_kept(into)?;
            if let Received::Frame(len) = received {
                self.filter.hear(into, len);
            }
            return Ok(received);
        };
        Ok(Received::own_kept(&frame, into))
    }

    fn readable_fd(&self) -> BorrowedFd<'_> {
        self.inner.readable_fd()
    }

    fn writable_fd(&self) -> BorrowedFd<'_> {
        self.inner.writable_fd()
    }

    fn set_guest_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.inner.set_guest_offloads(offloads)
    }

    fn set_active(&mut self, active: bool) -> io::Result<()> {
        self.inner.set_active(active)
    }
}

/// Bytes as a frame in both directions, held against what can be said of it without reading all of it.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    use alveole_egress_rules::Egress;
    let Some((offloads, frame)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return;
    };
    let Ok(rule) = "allow,to=10.0.0.0/8,protocol=tcp,port=443".parse() else {
        return;
    };
    let Ok(policy) = Policy::new(&[rule], Egress::Closed, &[], &[], &[]) else {
        return;
    };
    let filter = Filter::new(policy, Arc::new(EgressCounters::new("fuzz")));
    let start = bytes.get(..START_BYTES).unwrap_or(bytes);
    if filter.passes(start, frame.len()) {
        let is_tcp_443 = frame.get(23) == Some(&6) && frame.get(36..38) == Some(&[1, 187]);
        let is_dhcp = frame.get(34..38) == Some(&[0, 68, 0, 67]);
        match (frame.get(12..14), frame.get(30..34)) {
            (Some([8, 6]), _) => {}
            (Some([8, 0]), Some([10, ..])) => assert!(is_tcp_443),
            (Some([8, 0]), Some([255, 255, 255, 255])) => assert!(is_dhcp),
            (Some([0x86, 0xdd]), _) => match frame.get(38..40) {
                Some([0xff, 2]) => {}
                Some([0xfe, low]) => assert_eq!(low & 0xc0, 0x80),
                other => unreachable!("{other:?}"),
            },
            other => unreachable!("{other:?}"),
        }
        // Where a checksum is to be written, there are no addresses and no ports.
        let [flags, _, _, _, _, _, s0, s1, o0, o1, ..] = *offloads;
        if flags & 1 != 0 {
            let [start, offset] =
                [[s0, s1], [o0, o1]].map(|le| usize::from(u16::from_le_bytes(le)));
            assert!(start.saturating_add(offset) >= 38);
        }
    }
    // From outside it may only open the way back.
    filter.hear(start, bytes.len() as u64);
    filter.passes(start, frame.len());
    assert!(lock(&filter.refusals).len() <= MAX_WAITING_REFUSALS);
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::IpAddr;
    use std::os::unix::net::UnixDatagram;

    use alveole_counters::CounterSet;
    use alveole_egress_rules::Egress;
    use alveole_guest_memory::{GuestRam, MemoryPlan};
    use alveole_net_link::testing::pair;
    use proptest::prelude::*;

    use super::*;
    use crate::refusal::sum;

    pub(crate) const GUEST4: &str = "10.0.2.15";
    pub(crate) const GUEST6: &str = "fd00::15";
    const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

    /// A frame in the making.
    #[derive(Debug, Clone)]
    pub(crate) struct Build {
        from: IpAddr,
        to: IpAddr,
        protocol: u8,
        hop_limit: u8,
        /// Extension headers: the kind, and its bytes without that of the next.
        extensions: Vec<(u8, Vec<u8>)>,
        transport: Vec<u8>,
        payload: Vec<u8>,
    }

    pub(crate) fn packet(to: &str, protocol: u8, transport: &[u8]) -> Build {
        let to: IpAddr = to.parse().unwrap();
        let own = if to.is_ipv4() { GUEST4 } else { GUEST6 };
        Build {
            from: own.parse().unwrap(),
            to,
            protocol,
            hop_limit: 64,
            extensions: Vec::new(),
            transport: transport.to_vec(),
            payload: Vec::new(),
        }
    }

    fn ports(from: u16, to: u16) -> Vec<u8> {
        [from.to_be_bytes(), to.to_be_bytes()].concat()
    }

    /// A segment that asks for a connection.
    pub(crate) fn tcp(to: &str, port: u16) -> Build {
        let mut header = ports(40_000, port);
        header.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
        packet(to, 6, &header)
    }

    pub(crate) fn udp(to: &str, port: u16) -> Build {
        let mut header = ports(40_000, port);
        header.extend([0, 8, 0, 0]);
        packet(to, 17, &header)
    }

    pub(crate) fn icmp6(to: &str, kind: u8, hop_limit: u8) -> Build {
        let mut build = packet(to, 58, &[kind, 0, 0, 0, 0, 7, 0, 0]);
        build.hop_limit = hop_limit;
        build
    }

    fn echo(to: &str, kind: u8) -> Build {
        packet(to, 1, &[kind, 0, 0, 0, 0, 7, 0, 0])
    }

    impl Build {
        pub(crate) fn source_port(mut self, port: u16) -> Self {
            self.transport[..2].copy_from_slice(&port.to_be_bytes());
            self
        }

        fn flags(mut self, flags: u8) -> Self {
            self.transport[13] = flags;
            self
        }

        fn payload(mut self, bytes: &[u8]) -> Self {
            self.payload = bytes.to_vec();
            self
        }

        fn extended(mut self, kind: u8, bytes: &[u8]) -> Self {
            self.extensions.push((kind, bytes.to_vec()));
            self
        }

        /// The same from the other side.
        fn answered(mut self) -> Self {
            std::mem::swap(&mut self.from, &mut self.to);
            if matches!(self.protocol, 6 | 17) {
                let (from, rest) = self.transport.split_at_mut(2);
                from.swap_with_slice(&mut rest[..2]);
            }
            self
        }

        pub(crate) fn bytes(&self) -> Vec<u8> {
            let mut frame = [ROUTER_MAC, GUEST_MAC].concat();
            let content = [&self.transport[..], &self.payload].concat();
            match (self.from, self.to) {
                (IpAddr::V4(from), IpAddr::V4(to)) => {
                    let [t0, t1] = (20 + content.len() as u16).to_be_bytes();
                    frame.extend([
                        8,
                        0,
                        0x45,
                        0,
                        t0,
                        t1,
                        0,
                        0,
                        0,
                        0,
                        self.hop_limit,
                        self.protocol,
                        0,
                        0,
                    ]);
                    frame.extend([from.octets(), to.octets()].concat());
                }
                (IpAddr::V6(from), IpAddr::V6(to)) => {
                    let mut between = Vec::new();
                    for (at, (_, bytes)) in self.extensions.iter().enumerate() {
                        let next = self.extensions.get(at + 1).map_or(self.protocol, |e| e.0);
                        between.push(next);
                        between.extend(bytes);
                    }
                    let first = self.extensions.first().map_or(self.protocol, |e| e.0);
                    let [l0, l1] = (between.len() as u16 + content.len() as u16).to_be_bytes();
                    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, l0, l1, first, self.hop_limit]);
                    frame.extend([from.octets(), to.octets()].concat());
                    frame.extend(between);
                }
                _ => panic!("two families"),
            }
            frame.extend(content);
            frame
        }
    }

    fn policy(rules: &[&str]) -> Policy {
        let rules: Vec<_> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        Policy::new(&rules, Egress::Closed, &[], &[], &[]).unwrap()
    }

    /// A guest, its memory and the other end of its link.
    struct Wire {
        link: Box<dyn LinkQueue>,
        end: UnixDatagram,
        ram: GuestRam,
        counters: Arc<EgressCounters>,
    }

    impl Wire {
        fn new(rules: &[&str]) -> Self {
            let (link, mut ends) = pair(1);
            let counters = Arc::new(EgressCounters::new("eth0"));
            let mut link = filter(link, policy(rules), counters.clone()).unwrap();
            let end = ends.remove(0);
            end.set_nonblocking(true).unwrap();
            Self {
                link: link.queues.remove(0),
                end,
                ram: GuestRam::map(&MemoryPlan::around_hole(1 << 20).unwrap()).unwrap(),
                counters,
            }
        }

        /// Sends a frame of which a device has copied `copied` bytes and the rest lies in parts of `part` bytes; what arrives.
        fn send_in_parts(
            &mut self,
            frame: &[u8],
            copied: usize,
            part: usize,
            offloads: [u8; HEADER_BYTES],
        ) -> Option<Vec<u8>> {
            let (begin, rest) = frame.split_at(copied.min(frame.len()));
            let start = [&offloads, begin].concat();
            let mut buffers = GuestBuffers::new(&self.ram);
            for (at, bytes) in (0u64..).zip(rest.chunks(part)) {
                buffers
                    .push(0x1000 + at * (part as u64 + 1), bytes.len() as u64)
                    .unwrap();
            }
            buffers.copy_from(0, rest);
            let sent = self.link.send(Frame {
                start: &start,
                rest: &buffers,
            });
            assert_eq!(sent.unwrap(), Sent::Done);
            let mut arrived = vec![0; 70_000];
            let len = self.end.recv(&mut arrived).ok()?;
            assert_eq!(arrived[..HEADER_BYTES], offloads);
            Some(arrived[HEADER_BYTES..len].to_vec())
        }

        fn passes(&mut self, frame: &[u8]) -> bool {
            match self.send_in_parts(frame, 0, 4096, [0; HEADER_BYTES]) {
                None => false,
                Some(arrived) => {
                    assert!(arrived == frame);
                    true
                }
            }
        }

        /// A frame from outside, which must arrive whole.
        fn hears(&mut self, frame: &[u8]) {
            while self.receives().is_some() {}
            self.end
                .send(&[&[0; HEADER_BYTES], frame].concat())
                .unwrap();
            assert_eq!(self.receives().unwrap(), frame);
        }

        fn receives(&mut self) -> Option<Vec<u8>> {
            let mut into = GuestBuffers::new(&self.ram);
            into.push(0x8_0000, 100).unwrap();
            into.push(0x9_0000, 5000).unwrap();
            match self.link.receive(&into).unwrap() {
                Received::Frame(len) => {
                    let mut bytes = vec![0; len as usize];
                    into.copy_to(0, &mut bytes);
                    Some(bytes.split_off(HEADER_BYTES))
                }
                Received::WouldBlock => None,
                other => panic!("{other:?}"),
            }
        }

        fn count(&self, name: &str) -> u64 {
            let mut found = None;
            self.counters.visit(&mut |n, value| {
                if n == name {
                    found = Some(value);
                }
            });
            found.unwrap()
        }
    }

    const RULE: &str = "allow,to=198.51.100.0/24,protocol=tcp,port=80";
    const RULE6: &str = "allow,to=2001:db8::/32,protocol=tcp,port=80";

    #[test]
    fn frames_pass_as_they_are_however_they_are_cut() {
        let mut wire = Wire::new(&[RULE, RULE6]);
        let payload: Vec<u8> = (0..3000).map(|n| (n % 251) as u8).collect();
        for frame in [
            tcp("198.51.100.1", 80).bytes(),
            tcp("198.51.100.1", 80).payload(&payload).bytes(),
            tcp("2001:db8::7", 80).payload(&payload[..70]).bytes(),
            [&[0xff; 6], &GUEST_MAC[..], &[8, 6], &[7; 46]].concat(),
        ] {
            for copied in [0, 14, 26, 127, 128, 129, 1000] {
                for part in [1, 7, 100, 4096] {
                    let arrived = wire.send_in_parts(&frame, copied, part, [0; HEADER_BYTES]);
                    assert!(arrived.as_ref() == Some(&frame), "{copied} {part}");
                }
            }
        }
        let refused = tcp("198.51.100.1", 81).payload(&payload).bytes();
        for copied in [0, 14, 26, 1000] {
            for part in [1, 100] {
                assert_eq!(
                    wire.send_in_parts(&refused, copied, part, [0; HEADER_BYTES]),
                    None
                );
            }
        }
        assert_eq!(wire.count("denied"), 8);
    }

    #[test]
    fn what_cannot_be_read_is_refused_and_counted() {
        let mut wire = Wire::new(&[RULE, RULE6, "allow,to=any"]);
        let v4 = tcp("198.51.100.1", 80);
        let v6 = tcp("2001:db8::7", 80);
        let with = |frame: &Build, at: usize, byte: u8| {
            let mut frame = frame.bytes();
            frame[at] = byte;
            frame
        };
        let options = |count: usize| {
            let empty = [0, 1, 4, 0, 0, 0, 0];
            (0..count).fold(v6.clone(), |frame, _| frame.extended(60, &empty))
        };
        let tagged = {
            let mut frame = v4.bytes();
            frame.splice(12..12, [0x81, 0, 0, 5]);
            frame
        };
        for (what, frame, counter) in [
            ("a tag", tagged, "unreadable"),
            ("a length of 802.3", with(&v4, 12, 0), "unreadable"),
            ("half of a header", v4.bytes()[..33].to_vec(), "malformed"),
            ("half of a header", v6.bytes()[..53].to_vec(), "malformed"),
            ("another version", with(&v4, 14, 0x65), "malformed"),
            ("another version", with(&v6, 14, 0x45), "malformed"),
            ("options", with(&v4, 14, 0x46), "unreadable"),
            ("a header of 4 words", with(&v4, 14, 0x44), "malformed"),
            ("too long", with(&v4, 17, 41), "malformed"),
            ("too long", with(&v6, 19, 21), "malformed"),
            ("too short", with(&v4, 17, 19), "malformed"),
            ("too short for TCP", with(&v4, 17, 39), "malformed"),
            ("more fragments", with(&v4, 20, 0x20), "fragments"),
            ("a later fragment", with(&v4, 21, 1), "fragments"),
            (
                "a fragment",
                v6.clone().extended(44, &[0; 7]).bytes(),
                "fragments",
            ),
            (
                "a route",
                v6.clone().extended(43, &[0; 7]).bytes(),
                "unreadable",
            ),
            ("5 headers", options(5).bytes(), "unreadable"),
            (
                "a long header",
                v6.clone()
                    .extended(60, &[[10].as_slice(), &[0; 86]].concat())
                    .bytes(),
                "unreadable",
            ),
            (
                "a header that lies",
                v6.clone().extended(60, &[200, 0, 0, 0, 0, 0, 0]).bytes(),
                "malformed",
            ),
            (
                "ICMPv6 over IPv4",
                packet("198.51.100.1", 58, &[0; 8]).bytes(),
                "malformed",
            ),
            (
                "ICMP over IPv6",
                packet("2001:db8::7", 1, &[0; 8]).bytes(),
                "malformed",
            ),
            ("nothing", Vec::new(), "malformed"),
        ] {
            let before = wire.count(counter);
            assert!(!wire.passes(&frame), "{what}");
            assert_eq!(wire.count(counter), before + 1, "{what}");
        }
        for frame in [
            v4.bytes(),
            v6.bytes(),
            options(4).bytes(),
            with(&v4, 20, 0x40),
            v6.extended(0, &[0, 5, 2, 0, 0, 1, 0]).bytes(),
            // A sender pads what is short.
            [v4.bytes(), vec![0; 6]].concat(),
        ] {
            assert!(wire.passes(&frame));
        }
        assert_eq!(wire.count("denied"), 0);
    }

    #[test]
    fn checksums_are_not_written_over_headers() {
        let mut wire = Wire::new(&[RULE, RULE6, "allow,to=any,protocol=udp"]);
        let v4 = tcp("198.51.100.1", 80).payload(&[0; 200]).bytes();
        let v6 = tcp("2001:db8::7", 80).payload(&[0; 200]).bytes();
        let datagram = udp("198.51.100.1", 80).payload(&[0; 200]).bytes();
        let arp = [&[0xff; 6], &GUEST_MAC[..], &[8, 6], &[7; 46]].concat();
        let header = |flags, gso, start: u16, offset: u16| {
            let mut header = [flags, gso, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0];
            header[6..8].copy_from_slice(&start.to_le_bytes());
            header[8..10].copy_from_slice(&offset.to_le_bytes());
            header
        };
        for (frame, offloads, passes) in [
            (&v4, header(1, 0, 34, 16), true),
            (&v4, header(1, 1, 34, 16), true),
            (&v4, header(1, 0x81, 34, 16), true),
            (&v6, header(1, 4, 54, 16), true),
            (&datagram, header(1, 5, 34, 6), true),
            // The packet within a tunnel's.
            (&datagram, header(1, 0, 92, 16), true),
            // The destination, a port, the flags, by either number.
            (&v4, header(1, 0, 30, 0), false),
            (&v4, header(1, 0, 14, 16), false),
            (&v4, header(1, 0, 34, 2), false),
            (&v4, header(1, 0, 34, 12), false),
            (&v4, header(1, 0, 36, 0), false),
            (&v6, header(1, 0, 38, 0), false),
            (&datagram, header(1, 0, 34, 2), false),
            (&datagram, header(1, 0, 26, 4), false),
            (&arp, header(1, 0, 14, 16), false),
            // Segments of something else than what was judged.
            (&v4, header(1, 4, 34, 16), false),
            (&v4, header(1, 5, 34, 16), false),
            (&v6, header(1, 1, 54, 16), false),
            (&datagram, header(1, 1, 34, 6), false),
            (&datagram, header(1, 5, 92, 16), false),
            (&v4, header(0, 1, 0, 0), false),
            (&v4, header(1, 3, 34, 16), false),
        ] {
            let arrived = wire.send_in_parts(frame, 0, 4096, offloads);
            assert_eq!(arrived.is_some(), passes, "{offloads:?}");
        }
    }

    #[test]
    fn answers_pass_and_nothing_else_by_their_way() {
        let mut wire = Wire::new(&[]);
        const SYN: u8 = 2;
        const SYN_ACK: u8 = 18;
        const ACK: u8 = 16;
        // A connection from outside.
        let asked = tcp(GUEST4, 80).source_port(5000);
        let asked = Build {
            from: "203.0.113.9".parse().unwrap(),
            ..asked
        };
        let answer = asked.clone().answered();
        assert!(!wire.passes(&answer.clone().flags(SYN_ACK).bytes()));
        // Its middle opens nothing.
        wire.hears(&asked.clone().flags(ACK).bytes());
        wire.hears(&asked.clone().flags(SYN_ACK).bytes());
        assert!(!wire.passes(&answer.clone().flags(ACK).bytes()));
        wire.hears(&asked.flags(SYN).bytes());
        for flags in [SYN_ACK, ACK, 17, 4, 20] {
            assert!(wire.passes(&answer.clone().flags(flags).bytes()), "{flags}");
        }
        // It cannot call back, nor speak to or from other ports.
        assert!(!wire.passes(&answer.clone().flags(SYN).bytes()));
        assert!(!wire.passes(&answer.clone().source_port(81).flags(ACK).bytes()));
        let elsewhere = tcp("203.0.113.9", 5001).source_port(80).flags(ACK);
        assert!(!wire.passes(&elsewhere.bytes()));
        assert!(!wire.passes(&tcp("203.0.113.8", 5000).source_port(80).flags(ACK).bytes()));
        // Datagrams, over IPv6; and pings.
        let asked = Build {
            from: "2001:db8::9".parse().unwrap(),
            ..udp(GUEST6, 53)
        };
        assert!(!wire.passes(&asked.clone().answered().bytes()));
        wire.hears(&asked.bytes());
        assert!(wire.passes(&asked.clone().answered().bytes()));
        assert!(!wire.passes(&udp("2001:db8::9", 53).source_port(53).bytes()));
        wire.receives();
        let ping = Build {
            from: "203.0.113.9".parse().unwrap(),
            ..echo(GUEST4, 8)
        };
        wire.hears(&ping.bytes());
        assert!(wire.passes(&echo("203.0.113.9", 0).bytes()));
        assert!(!wire.passes(&echo("203.0.113.9", 8).bytes()));
        wire.receives();
        // Who looks for the guest by an address of the world is told where it is.
        let told = icmp6("2001:db8::3", 136, 255);
        assert!(!wire.passes(&told.bytes()));
        let looks = icmp6(GUEST6, 135, 255);
        wire.hears(
            &Build {
                from: "2001:db8::3".parse().unwrap(),
                ..looks
            }
            .bytes(),
        );
        assert!(wire.passes(&told.bytes()));
        assert_eq!(wire.count("answers"), 8);
    }

    #[test]
    fn what_the_guest_writes_into_its_own_memory_is_no_peer() {
        let mut wire = Wire::new(&[]);
        // The link's frame is hostile to nobody; the guest's memory, where it arrives, says something else at once.
        let frame = Build {
            from: "203.0.113.9".parse().unwrap(),
            ..udp(GUEST4, 80)
        };
        let forged = Build {
            from: "198.51.100.66".parse().unwrap(),
            ..udp(GUEST4, 80)
        };
        let mut into = GuestBuffers::new(&wire.ram);
        into.push(0x8_0000, 5000).unwrap();
        into.copy_from(HEADER_BYTES as u64, &forged.bytes());
        wire.end
            .send(&[&[0; HEADER_BYTES][..], &frame.bytes()].concat())
            .unwrap();
        wire.link.receive(&into).unwrap();
        assert!(wire.passes(&frame.answered().bytes()));
        assert!(!wire.passes(&forged.answered().bytes()));
    }

    #[test]
    fn refusals_are_told_by_good_messages() {
        let mut wire = Wire::new(&[]);
        for frame in [
            tcp("198.51.100.1", 25),
            udp("198.51.100.1", 25),
            echo("198.51.100.1", 8),
        ] {
            let sent = frame.payload(&[9; 100]).bytes();
            assert!(!wire.passes(&sent));
            let told = wire.receives().unwrap();
            assert_eq!(told[..12], [GUEST_MAC, ROUTER_MAC].concat());
            let (header, message) = told[14..].split_at(20);
            assert_eq!(sum(header), [0, 0]);
            assert_eq!(sum(message), [0, 0]);
            assert_eq!(message[..2], [3, 13]);
            assert_eq!(message[8..], sent[14..42]);
            assert_eq!(header[12..], [&sent[30..34], &sent[26..30]].concat());
            assert_eq!(
                usize::from(u16::from_be_bytes([header[2], header[3]])),
                told.len() - 14
            );
        }
        let sent = tcp("2001:db8::1", 25).payload(&[9; 100]).bytes();
        assert!(!wire.passes(&sent));
        let told = wire.receives().unwrap();
        let (header, message) = told[14..].split_at(40);
        let pseudo = [&header[8..40], &[0, 0, header[4], header[5], 0, 0, 0, 58]].concat();
        assert_eq!(sum(&[&pseudo, message].concat()), [0, 0]);
        assert_eq!(message[..2], [1, 1]);
        assert_eq!(message[8..], sent[14..78]);
        // Errors and groups are answered by nobody, and no more than some wait.
        assert!(!wire.passes(&echo("198.51.100.1", 3).bytes()));
        assert!(!wire.passes(&udp("224.0.0.251", 5353).bytes()));
        assert_eq!(wire.receives(), None);
        for _ in 0..2 * MAX_WAITING_REFUSALS {
            assert!(!wire.passes(&sent));
        }
        let waiting = std::iter::from_fn(|| wire.receives()).count();
        assert_eq!(waiting, MAX_WAITING_REFUSALS);
    }

    fn any_frame() -> impl Strategy<Value = Vec<u8>> {
        let address = prop::sample::select(vec![
            "10.1.2.3",
            "198.51.100.1",
            "fd00::9",
            "255.255.255.255",
            "ff02::1:2",
            "fe80::1",
        ]);
        let port = prop::sample::select(vec![443u16, 67, 547, 53, 80]);
        let damage = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
        let build = (address, port, 0..4u8, damage, any::<bool>()).prop_map(
            |(to, port, kind, damage, cut)| {
                let mut frame = match kind {
                    0 => tcp(to, port),
                    1 => udp(to, port).source_port(port.wrapping_add(1)),
                    2 => udp(to, port).source_port(port.wrapping_sub(1)),
                    _ => icmp6("fe80::1", 135, 255),
                }
                .bytes();
                for (at, byte) in damage {
                    let at = at.index(frame.len());
                    if cut && byte > 200 {
                        frame.truncate(at.max(1));
                    } else {
                        frame[at] = byte;
                    }
                }
                frame
            },
        );
        prop_oneof![build, prop::collection::vec(any::<u8>(), 0..200)]
    }

    proptest! {
        #[test]
        fn no_frame_goes_where_it_may_not(
            offloads in prop_oneof![Just([0; HEADER_BYTES]), any::<[u8; HEADER_BYTES]>()],
            frame in any_frame(),
        ) {
            fuzz(&[&offloads, &frame[..]].concat());
        }
    }
}
