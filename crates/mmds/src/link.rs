//! The service in front of a link.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alveole_guest_memory::GuestBuffers;
use alveole_net_link::{Frame, HEADER_BYTES, LinkQueue, NetLink, Offloads, Received, Sent};

use crate::Metadata;
use crate::stack::{HEAD_BYTES, MAX_FRAME_BYTES, Stack, is_for};

/// Puts the service in front of a link: what the guest sends to the service's address is answered here, everything else
/// passes. The address is that which `metadata` has been given by now.
///
/// # Errors
/// The host's kernel serves the link (vhost), so that no frame comes by here; the host has no random bytes.
pub fn detour(link: NetLink, metadata: &Arc<Metadata>) -> io::Result<NetLink> {
    if !link.vhost.is_empty() {
        return Err(io::Error::other(
            "the metadata service sees no frame of an interface that the host's kernel serves; give this one without vhost",
        ));
    }
    let address = metadata.config().address;
    let stack = Stack::new(metadata.clone(), address)
        .map_err(|e| io::Error::other(format!("the metadata service gets no random bytes: {e}")))?;
    let service = Arc::new(Service {
        stack: Mutex::new(stack),
        has_frames: AtomicBool::new(false),
        address,
    });
    let queues = link.queues.into_iter().map(|inner| {
        let service = service.clone();
        Box::new(Detour { inner, service }) as Box<dyn LinkQueue>
    });
    Ok(NetLink {
        facts: link.facts,
        queues: queues.collect(),
        vhost: Vec::new(),
    })
}

/// One for all queues of an interface: a guest may send the frames of one connection by any of them.
struct Service {
    stack: Mutex<Stack>,
    has_frames: AtomicBool,
    address: Ipv4Addr,
}

struct Detour {
    inner: Box<dyn LinkQueue>,
    service: Arc<Service>,
}

impl Service {
    fn stack(&self) -> MutexGuard<'_, Stack> {
        self.stack.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it was for the service, which has it then.
    fn take(&self, frame: Frame<'_>) -> bool {
        let start = frame.start.get(HEADER_BYTES..).unwrap_or(&[]);
        let len = usize::try_from(frame.len_bytes()).unwrap_or(usize::MAX);
        let copy = |most: usize, into: &mut [u8]| {
            let into = into.get_mut(..len.min(most)).unwrap_or(&mut []);
            let (first, rest) = into.split_at_mut(start.len().min(into.len()));
            first.copy_from_slice(start.get(..first.len()).unwrap_or(&[]));
            frame.rest.copy_to(0, rest);
            into.len()
        };
        let mut head = [0; HEAD_BYTES];
        let known = copy(HEAD_BYTES, &mut head);
        if !is_for(self.address, head.get(..known).unwrap_or(&[])) {
            return false;
        }
        // One more than is read, so that what is too long is seen to be.
        let most = MAX_FRAME_BYTES.saturating_add(1);
        let mut whole = vec![0; len.min(most)];
        copy(most, &mut whole);
        // A guest that writes while it sends gains nothing: what is looked at from here on is the copy.
        let mut stack = self.stack();
        stack.take(whole);
        self.has_frames.store(stack.has_frames(), Ordering::Release);
        true
    }

    fn give(&self) -> Option<Vec<u8>> {
        if !self.has_frames.load(Ordering::Acquire) {
            return None;
        }
        let mut stack = self.stack();
        let frame = stack.give();
        self.has_frames.store(stack.has_frames(), Ordering::Release);
        frame
    }
}

impl LinkQueue for Detour {
    fn send(&mut self, frame: Frame<'_>) -> io::Result<Sent> {
        if self.service.take(frame) {
            return Ok(Sent::Done);
        }
        self.inner.send(frame)
    }

    fn flush(&mut self) -> io::Result<bool> {
        self.inner.flush()
    }

    /// The service's frames first. Nothing tells of them by [`Self::readable_fd`]: they come of frames that the guest has sent,
    /// and whoever sends for a guest looks for frames to it afterwards.
    fn receive(&mut self, into: &GuestBuffers) -> io::Result<Received> {
        let Some(frame) = self.service.give() else {
            return self.inner.receive(into);
        };
        Ok(Received::own(&frame, into))
    }

    fn receive_kept(&mut self, into: &mut [u8]) -> io::Result<Received> {
        let Some(frame) = self.service.give() else {
            return self.inner.receive_kept(into);
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
