//! Who may send how much (section 5.10.6.3). Counts bytes, does nothing else. All counters run without end.

use crate::{MAX_CONNECTIONS, MAX_CREDIT_BYTES, MAX_TOTAL_CREDIT_BYTES, MIN_CREDIT_BYTES};

/// What may be sent to the guest.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Outgoing {
    sent: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Outgoing {
    /// Takes what the guest says of its buffers. A count that says it has consumed more than it was sent is a
    /// lie, or older than what was heard last (packets of two processors can overtake each other): either
    /// way the one that is known stays.
    pub(crate) fn hear(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.buf_alloc = buf_alloc;
        if fwd_cnt.wrapping_sub(self.fwd_cnt) <= self.in_flight() {
            self.fwd_cnt = fwd_cnt;
        }
    }

    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.fwd_cnt)
    }

    /// How many bytes the guest has room for.
    pub(crate) fn free(&self) -> u32 {
        self.buf_alloc.saturating_sub(self.in_flight())
    }

    /// Counts bytes that were sent.
    pub(crate) fn count(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }
}

/// What the guest may send.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Incoming {
    buf_alloc: u32,
    received: u32,
    forwarded: u32,
    /// What the guest knows of `forwarded`.
    told: u32,
}

impl Incoming {
    pub(crate) fn new(buf_alloc: u32) -> Self {
        Self {
            buf_alloc,
            ..Self::default()
        }
    }

    /// Takes bytes in; false where the guest has no credit for them.
    pub(crate) fn take(&mut self, len: u32) -> bool {
        if len > self.buf_alloc.saturating_sub(self.kept()) {
            return false;
        }
        self.received = self.received.wrapping_add(len);
        true
    }

    /// How many bytes have come that were not passed on.
    pub(crate) fn kept(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Counts bytes that were passed on.
    pub(crate) fn forward(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len);
    }

    /// What the next packet tells the guest: `buf_alloc` and `fwd_cnt`.
    pub(crate) fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (self.buf_alloc, self.forwarded)
    }

    /// Whether the guest knows so little of its credit that it should be told: early enough that it need not
    /// stop, late enough that this is rare.
    pub(crate) fn is_worth_telling(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= (self.buf_alloc / 2).max(1)
    }
}

/// All that is given as credit, so that the sum of it is bounded.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    given: u64,
}

impl Pool {
    /// Every connection can have the least; a newcomer gets besides at most a sixteenth of what is left.
    pub(crate) fn give(&mut self) -> u32 {
        let least = (MAX_CONNECTIONS as u64).saturating_mul(MIN_CREDIT_BYTES.into());
        let left = MAX_TOTAL_CREDIT_BYTES
            .saturating_sub(least)
            .saturating_sub(self.given);
        let most = MAX_CREDIT_BYTES.saturating_sub(MIN_CREDIT_BYTES);
        let more = u32::try_from(left / 16).unwrap_or(u32::MAX).min(most);
        self.given = self.given.saturating_add(more.into());
        MIN_CREDIT_BYTES.saturating_add(more)
    }

    pub(crate) fn take_back(&mut self, credit: u32) {
        let more = credit.saturating_sub(MIN_CREDIT_BYTES);
        self.given = self.given.saturating_sub(more.into());
    }
}

impl Incoming {
    /// All that the guest may send.
    pub(crate) fn credit(&self) -> u32 {
        self.buf_alloc
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever a guest says, no more is in flight than the most room it ever spoke of.
        #[test]
        fn no_lie_makes_us_send_more_than_there_was_room(
            said in prop::collection::vec((0u32..1 << 20, any::<u32>(), any::<bool>()), 1..200),
        ) {
            let mut out = Outgoing::default();
            let (mut sent, mut consumed, mut most) = (0u64, 0u64, 0u64);
            for (room, noise, honest) in said {
                let in_flight = sent - consumed;
                let fwd_cnt = if honest {
                    consumed += u64::from(noise) % (in_flight + 1);
                    consumed as u32
                } else {
                    noise
                };
                most = most.max(room.into());
                out.hear(room, fwd_cnt);
                let len = out.free();
                out.count(len);
                sent += u64::from(len);
                prop_assert!(out.in_flight() <= most as u32);
            }
        }

        /// An honest guest's room is used to the last byte, round and round the counters.
        #[test]
        fn an_honest_guest_gets_what_it_has_room_for(
            steps in prop::collection::vec((1u32..1 << 20, 0u32..1 << 20), 1..300),
        ) {
            const ROOM: u32 = 1 << 20;
            let mut out = Outgoing { sent: u32::MAX - 1000, buf_alloc: 0, fwd_cnt: u32::MAX - 1000 };
            let mut consumed = u32::MAX - 1000;
            for (send, consume) in steps {
                out.hear(ROOM, consumed);
                prop_assert_eq!(out.free(), ROOM - out.sent.wrapping_sub(consumed));
                out.count(send.min(out.free()));
                consumed = consumed.wrapping_add(consume.min(out.in_flight()));
            }
        }
    }

    #[test]
    fn a_guest_gets_no_more_than_its_credit_and_is_told_in_time() {
        let mut incoming = Incoming::new(100);
        assert!(incoming.take(100) && !incoming.take(1) && incoming.take(0));
        incoming.forward(49);
        assert!(!incoming.is_worth_telling());
        incoming.forward(1);
        assert!(incoming.is_worth_telling());
        assert_eq!((incoming.kept(), incoming.tell()), (50, (100, 50)));
        assert!(!incoming.is_worth_telling());
        assert!(!incoming.take(51) && incoming.take(50) && !incoming.take(u32::MAX));
    }

    #[test]
    fn all_credit_together_is_bounded_and_comes_back() {
        let mut pool = Pool::default();
        let given: Vec<_> = (0..MAX_CONNECTIONS).map(|_| pool.give()).collect();
        assert_eq!(given[0], MAX_CREDIT_BYTES);
        assert!(given.iter().all(|c| *c >= MIN_CREDIT_BYTES));
        let all: u64 = given.iter().map(|c| u64::from(*c)).sum();
        assert!(all <= MAX_TOTAL_CREDIT_BYTES, "{all}");
        for credit in given {
            pool.take_back(credit);
        }
        assert_eq!((pool.given, pool.give()), (0, MAX_CREDIT_BYTES));
    }
}
