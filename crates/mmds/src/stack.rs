//! The TCP stack that answers a guest's frames: `smoltcp` with a few listening sockets.
//!
//! It is only ever run by a frame of the guest, or when the guest takes one: nothing here needs a timer, as the way to the guest loses
//! nothing, and what the guest loses it sends again.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Instant;

use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as StackTime;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

use crate::http::{Parsed, parse};
use crate::{HARDWARE_ADDRESS, MAX_CONNECTIONS, MAX_REQUEST_BYTES, MAX_WAITING_FRAMES, Metadata};

/// Longest frame that is read: a whole request in one segment, with the longest headers. A guest whose segments are cut by the
/// device may send more than its MTU.
pub(crate) const MAX_FRAME_BYTES: usize = MAX_REQUEST_BYTES + 14 + 60 + 60;
/// Longest frame that is sent: what each guest takes.
const MTU_BYTES: usize = 1514;
const PORT: u16 = 80;
/// What one connection may have on its way to the guest.
const SEND_BYTES: usize = 8192;
/// Most rounds of one run: what one frame brings about takes two.
const MOST_ROUNDS: u32 = 8;

/// Where the frames come from and go to.
#[derive(Default)]
struct Frames {
    incoming: Option<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
    /// There was no room for one.
    refused: bool,
}

struct Incoming(Vec<u8>);
struct Outgoing<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Frames {
    fn has_room(&mut self) -> bool {
        let is_full = self.outgoing.len() >= MAX_WAITING_FRAMES;
        self.refused |= is_full;
        !is_full
    }
}

impl Device for Frames {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: StackTime) -> Option<(Incoming, Outgoing<'_>)> {
        if self.incoming.is_none() || !self.has_room() {
            return None;
        }
        let frame = self.incoming.take()?;
        Some((Incoming(frame), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: StackTime) -> Option<Outgoing<'_>> {
        self.has_room().then_some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MTU_BYTES;
        // A guest leaves these to its device, which passes frames on in memory.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

/// One socket, and what is said on it.
struct Connection {
    socket: SocketHandle,
    request: Vec<u8>,
    answer: Vec<u8>,
    sent: usize,
    /// After the answer.
    ends: bool,
    is_open: bool,
    last_used: Instant,
}

/// The stack.
pub(crate) struct Stack {
    interface: Interface,
    frames: Frames,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    metadata: Arc<Metadata>,
    began: Instant,
}

/// Whether a frame that begins so is for the service: it asks who has its address, or goes to it.
pub(crate) fn is_for(address: Ipv4Addr, head: &[u8]) -> bool {
    let target = match head.get(12..14) {
        Some([0x08, 0x06]) => head.get(38..42),
        Some([0x08, 0x00]) => head.get(30..34),
        _ => None,
    };
    target == Some(&address.octets())
}

/// How much of a frame [`is_for`] looks at.
pub(crate) const HEAD_BYTES: usize = 42;

fn listening() -> tcp::Socket<'static> {
    let room = |len| tcp::SocketBuffer::new(vec![0; len]);
    let mut socket = tcp::Socket::new(room(MAX_REQUEST_BYTES), room(SEND_BYTES));
    socket.set_ack_delay(None);
    socket.set_nagle_enabled(false);
    if socket.listen(PORT).is_err() {
        log::error!("mmds: a new socket cannot listen");
    }
    socket
}

impl Stack {
    /// # Errors
    /// The host has no random bytes.
    pub(crate) fn new(
        metadata: Arc<Metadata>,
        address: Ipv4Addr,
    ) -> Result<Self, getrandom::Error> {
        let began = Instant::now();
        let mut frames = Frames::default();
        let mut config = Config::new(EthernetAddress(HARDWARE_ADDRESS).into());
        let mut seed = [0; 8];
        getrandom::fill(&mut seed)?;
        config.random_seed = u64::from_le_bytes(seed);
        let mut interface = Interface::new(config, &mut frames, StackTime::ZERO);
        interface.update_ip_addrs(|addresses| {
            // Everybody is a neighbour: the guest, whatever its address is, is the only one there.
            if addresses
                .push(IpCidr::new(IpAddress::Ipv4(address), 0))
                .is_err()
            {
                log::error!("mmds: there is no room for an address");
            }
        });
        let mut sockets = SocketSet::new(Vec::new());
        let connections = (0..MAX_CONNECTIONS).map(|_| Connection {
            socket: sockets.add(listening()),
            request: Vec::new(),
            answer: Vec::new(),
            sent: 0,
            ends: false,
            is_open: false,
            last_used: began,
        });
        Ok(Self {
            connections: connections.collect(),
            interface,
            frames,
            sockets,
            metadata,
            began,
        })
    }

    /// A frame of the guest.
    pub(crate) fn take(&mut self, frame: Vec<u8>) {
        let counters = self.metadata.counters();
        counters.rx_frames.inc();
        if frame.len() > MAX_FRAME_BYTES {
            counters.rx_too_long.inc();
            return;
        }
        // What time has brought about comes first: it frees sockets.
        self.run();
        self.frames.incoming = Some(frame);
        self.run();
        // A guest that takes no frames gets no answer to more of its own.
        self.frames.incoming = None;
        self.make_room();
    }

    /// Whether a frame waits for the guest.
    pub(crate) fn has_frames(&self) -> bool {
        !self.frames.outgoing.is_empty()
    }

    /// A frame for the guest.
    pub(crate) fn give(&mut self) -> Option<Vec<u8>> {
        let frame = self.frames.outgoing.pop_front();
        if self.frames.refused && self.frames.outgoing.len() < MAX_WAITING_FRAMES / 2 {
            self.frames.refused = false;
            self.run();
        }
        if frame.is_some() {
            self.metadata.counters().tx_frames.inc();
        }
        frame
    }

    fn run(&mut self) {
        let now = Instant::now();
        let micros = now.saturating_duration_since(self.began).as_micros();
        let time = StackTime::from_micros(i64::try_from(micros).unwrap_or(i64::MAX));
        for _ in 0..MOST_ROUNDS {
            let polled = self
                .interface
                .poll(time, &mut self.frames, &mut self.sockets);
            let mut served = false;
            for connection in &mut self.connections {
                served |= connection.serve(&mut self.sockets, &self.metadata, now);
            }
            if polled == PollResult::None && !served {
                break;
            }
        }
    }

    /// Somebody must be able to connect next.
    fn make_room(&mut self) {
        let sockets = &mut self.sockets;
        let is_listening = |connection: &Connection| {
            sockets
                .get::<tcp::Socket<'_>>(connection.socket)
                .is_listening()
        };
        if self.connections.iter().any(is_listening) {
            return;
        }
        let idlest = self
            .connections
            .iter()
            .min_by_key(|connection| connection.last_used);
        if let Some(connection) = idlest {
            sockets
                .get_mut::<tcp::Socket<'_>>(connection.socket)
                .abort();
            self.metadata.counters().connections_evicted.inc();
            self.run();
        }
    }
}

impl Connection {
    /// Reads, answers and sends what can be; whether that was anything.
    fn serve(
        &mut self,
        sockets: &mut SocketSet<'static>,
        metadata: &Metadata,
        now: Instant,
    ) -> bool {
        let socket = sockets.get_mut::<tcp::Socket<'_>>(self.socket);
        match socket.state() {
            tcp::State::Listen => return false,
            // A connection that was cut has still to tell so.
            tcp::State::Closed if socket.remote_endpoint().is_some() => return false,
            // Nobody else comes from where it went: waiting would only keep others out.
            tcp::State::Closed | tcp::State::TimeWait => {
                *socket = listening();
                self.request.clear();
                self.answer.clear();
                (self.sent, self.ends, self.is_open) = (0, false, false);
                return true;
            }
            _ => {}
        }
        if !self.is_open {
            self.is_open = true;
            self.last_used = now;
            metadata.counters().connections_created.inc();
        }
        if socket.state() == tcp::State::SynReceived {
            return false;
        }
        let mut did = false;
        loop {
            let read = self.read(socket);
            let answered = self.answer(metadata, now);
            let sent = self.send(socket);
            if !read && !answered && !sent {
                break;
            }
            (did, self.last_used) = (true, now);
        }
        if self.answer.is_empty() && socket.may_send() && (self.ends || !socket.may_recv()) {
            socket.close();
            did = true;
        }
        did
    }

    fn read(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        let room = MAX_REQUEST_BYTES.saturating_sub(self.request.len());
        if self.ends {
            // Whatever follows is not read; it must not keep the other side from seeing the answer.
            return socket.can_recv() && socket.recv(|bytes| (bytes.len(), ())).is_ok();
        }
        if room == 0 || !socket.can_recv() {
            return false;
        }
        let read = socket.recv(|bytes| {
            let some = bytes.get(..room).unwrap_or(bytes);
            self.request.extend_from_slice(some);
            (some.len(), ())
        });
        read.is_ok()
    }

    fn answer(&mut self, metadata: &Metadata, now: Instant) -> bool {
        if !self.answer.is_empty() || self.ends {
            return false;
        }
        let bytes = match parse(&self.request) {
            Parsed::Partial => return false,
            Parsed::Request(request) => {
                self.ends = !request.keeps;
                let bytes = metadata.answer(&request, now).bytes(request.keeps);
                let len = request.len;
                self.request.drain(..len.min(self.request.len()));
                bytes
            }
            Parsed::Bad(answer) => {
                metadata.count(&answer);
                self.ends = true;
                self.request.clear();
                answer.bytes(false)
            }
        };
        self.answer = bytes;
        true
    }

    fn send(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        let Some(rest) = self.answer.get(self.sent..).filter(|rest| !rest.is_empty()) else {
            return false;
        };
        if !socket.can_send() {
            return false;
        }
        let Ok(sent) = socket.send_slice(rest) else {
            return false;
        };
        self.sent = self.sent.saturating_add(sent);
        if self.sent >= self.answer.len() {
            self.answer.clear();
            self.sent = 0;
        }
        sent > 0
    }
}

#[cfg(any(test, feature = "testing"))]
pub(crate) fn fuzz(mut bytes: &[u8]) {
    let metadata = Arc::new(Metadata::new(1000));
    metadata
        .put(serde_json::json!({"a": {"b": "c".repeat(900)}}))
        .unwrap_or_default();
    let Ok(mut stack) = Stack::new(metadata, crate::DEFAULT_ADDRESS) else {
        return;
    };
    while let Some((len, rest)) = bytes.split_first_chunk::<2>() {
        let len = usize::from(u16::from_le_bytes(*len)).min(rest.len());
        let (frame, rest) = rest.split_at(len);
        bytes = rest;
        stack.take(frame.to_vec());
        assert!(stack.frames.outgoing.len() <= MAX_WAITING_FRAMES);
        // Some guests take what is there.
        if len % 2 == 0 {
            while let Some(frame) = stack.give() {
                assert!(frame.len() <= MTU_BYTES);
            }
        }
    }
}
