//! The sending half of a pair: frames from the guest to the link.

use std::time::Duration;

use alveole_guest_memory::GuestBuffers;
use alveole_net_link::{Frame, Sent};
use alveole_virtio::{BrokenRing, Chain, LiveQueue};

use crate::extra_weight;
use crate::frame::{BadFrame, FrameRules, ParsedFrame};
use crate::lane::Lane;
use crate::shared::Shared;

/// Why no more frames are sent for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TxPause {
    /// The guest has none.
    Idle,
    /// The link takes none.
    Blocked,
    /// Until the limiter grants the next one.
    Until(Duration),
    /// The other direction first.
    Budget,
}

/// One transmit queue that is being served.
pub(crate) struct Tx {
    pub(crate) queue: LiveQueue,
    rules: FrameRules,
    chain: Chain,
    rest: GuestBuffers,
    /// The next frame was granted by the limiter before the link refused it.
    is_granted: bool,
}

impl Tx {
    pub(crate) fn new(queue: LiveQueue, features: u64, source: Option<[u8; 6]>) -> Self {
        Self {
            rest: GuestBuffers::new(queue.ram()),
            queue,
            rules: FrameRules { features, source },
            chain: Chain::new(),
            is_granted: false,
        }
    }

    /// Sends until something is in the way, or `budget` frames were.
    pub(crate) fn work(
        &mut self,
        lane: &mut Lane,
        shared: &Shared,
        budget: &mut u32,
    ) -> Result<TxPause, BrokenRing> {
        let pause = self.send_available(lane, shared, budget)?;
        match lane.link.flush() {
            Ok(true) => Ok(pause),
            Ok(false) => Ok(TxPause::Blocked),
            Err(e) => {
                shared.counters.tx_errors.inc();
                shared.say("the link takes no frames", &e);
                Ok(pause)
            }
        }
    }

    fn send_available(
        &mut self,
        lane: &mut Lane,
        shared: &Shared,
        budget: &mut u32,
    ) -> Result<TxPause, BrokenRing> {
        let counters = &shared.counters;
        loop {
            let Some(mut left) = budget.checked_sub(1) else {
                return Ok(TxPause::Budget);
            };
            if !self.queue.pop(&mut self.chain)? {
                return Ok(TxPause::Idle);
            }
            let read =
                ParsedFrame::read(&self.chain, self.queue.ram(), &self.rules, &mut self.rest);
            match read {
                Err(BadFrame::Malformed(why)) => {
                    counters.tx_malformed.inc();
                    log::debug!("{}: a frame is dropped: {why}", shared.name());
                }
                Err(BadFrame::Spoofed) => counters.tx_spoofed.inc(),
                Ok(_) if !shared.link_is_up() => counters.tx_link_down.inc(),
                Ok(frame) => {
                    if !self.is_granted
                        && let Err(wait) = shared.tx_limit.take(frame.len_bytes)
                    {
                        counters.tx_throttled.inc();
                        self.queue.put_back();
                        return Ok(TxPause::Until(wait));
                    }
                    let sent = lane.link.send(Frame {
                        start: frame.start(),
                        rest: &self.rest,
                    });
                    self.is_granted = matches!(sent, Ok(Sent::WouldBlock));
                    match sent {
                        Ok(Sent::Done) => {
                            counters.tx_frames.inc();
                            counters.tx_bytes.add(frame.len_bytes);
                            left = left.saturating_sub(extra_weight(frame.len_bytes));
                        }
                        Ok(Sent::WouldBlock) => {
                            counters.tx_blocked.inc();
                            self.queue.put_back();
                            return Ok(TxPause::Blocked);
                        }
                        Err(e) => {
                            counters.tx_errors.inc();
                            shared.say("a frame of the guest is lost", &e);
                        }
                    }
                }
            }
            *budget = left;
            self.queue.complete(self.chain.head(), 0)?;
        }
    }
}
