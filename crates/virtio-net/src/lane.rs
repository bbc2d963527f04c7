//! What outlives a stop of one pair of queues: its way to the link and its timers.

use alveole_net_link::{HEADER_BYTES, LinkQueue, MAX_FRAME_BYTES};
use vmm_sys_util::timerfd::TimerFd;

use crate::vhost::Vhost;

/// One pair's share of the device, lent to its worker.
pub(crate) struct Lane {
    pub(crate) link: Box<dyn LinkQueue>,
    /// When the rate limiter grants the next frame for the guest, or a frame has waited long enough.
    pub(crate) rx_timer: TimerFd,
    /// When the rate limiter grants the next frame of the guest.
    pub(crate) tx_timer: TimerFd,
    pub(crate) kept: Kept,
    /// What serves the pair in place of a worker of ours.
    pub(crate) vhost: Option<Vhost>,
}

/// A frame for which the guest has too few buffers at the moment. One for each pair, whatever comes.
#[derive(Default)]
pub(crate) struct Kept {
    bytes: Vec<u8>,
    len: usize,
}

impl Kept {
    /// Room for the longest frame and its header, allocated when it is needed for the first time.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        self.bytes
            .resize(HEADER_BYTES.saturating_add(MAX_FRAME_BYTES), 0);
        &mut self.bytes
    }

    /// The room was filled with a frame of so many bytes, header included.
    pub(crate) fn fill(&mut self, len: u64) {
        self.len = usize::try_from(len).unwrap_or(0);
    }

    /// The frame, if there is one.
    pub(crate) fn frame(&self) -> Option<&[u8]> {
        self.bytes.get(..self.len).filter(|frame| !frame.is_empty())
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }
}
