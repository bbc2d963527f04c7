//! Serves the control queue.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use alveole_event_loop::{Event, EventLoopError, Interest, Ops, Token, Worker};
use alveole_virtio::{BrokenRing, Chain, LiveQueue, Progress, QueueWorker};

use crate::config::mac_fault;
use crate::config_space::{CTRL_GUEST_OFFLOADS, CTRL_MAC_ADDR, GUEST_ANNOUNCE, GUEST_OFFLOADS, MQ};
use crate::control::Command;
use crate::lane::Lane;
use crate::shared::{Shared, lock};

/// VIRTIO_NET_OK and VIRTIO_NET_ERR (section 5.1.6.5).
const OK: u8 = 0;
const ERR: u8 = 1;

/// Most commands before other workers of the same loop have their turn. Abused by a guest that commands without end.
const COMMANDS_PER_TURN: u32 = 16;

pub(crate) struct ControlWorker {
    queue: LiveQueue,
    chain: Chain,
    lanes: Vec<Arc<Mutex<Lane>>>,
    shared: Arc<Shared>,
}

impl ControlWorker {
    pub(crate) fn new(queue: LiveQueue, lanes: Vec<Arc<Mutex<Lane>>>, shared: Arc<Shared>) -> Self {
        Self {
            queue,
            chain: Chain::new(),
            lanes,
            shared,
        }
    }

    fn serve(&mut self) -> Result<(), BrokenRing> {
        let mut budget = COMMANDS_PER_TURN;
        loop {
            while self.queue.pop(&mut self.chain)? {
                let Some(left) = budget.checked_sub(1) else {
                    self.queue.put_back();
                    self.queue.notify()?;
                    self.queue.doorbell().ring();
                    return Ok(());
                };
                budget = left;
                self.answer()?;
            }
            self.queue.notify()?;
            if !self.queue.want_doorbell()? {
                return Ok(());
            }
        }
    }

    fn answer(&mut self) -> Result<(), BrokenRing> {
        let head = self.chain.head();
        let (command, ack_addr) = Command::read(&self.chain, self.queue.ram())
            .map_err(|why| BrokenRing::NoRequest { head, why })?;
        let ack = if self.carry_out(command) {
            self.shared.counters.commands.inc();
            OK
        } else {
            self.shared.counters.commands_refused.inc();
            ERR
        };
        self.queue
            .ram()
            .write(ack_addr, &[ack])
            .map_err(|_| BrokenRing::NoMemory)?;
        self.queue.complete(head, 1)
    }

    /// Whether it was done.
    fn carry_out(&self, command: Command) -> bool {
        let shared = &self.shared;
        match command {
            Command::SetMac(mac) => {
                let fine = shared.has(CTRL_MAC_ADDR) && mac_fault(mac).is_none();
                if fine {
                    shared.set_mac(mac);
                }
                fine
            }
            Command::AnnounceAck => {
                let fine = shared.has(GUEST_ANNOUNCE);
                if fine {
                    shared.set_announcing(false);
                }
                fine
            }
            Command::SetPairs(pairs) => {
                let fine = shared.has(MQ) && pairs > 0 && pairs <= shared.abilities.pairs;
                fine && self.set_pairs(pairs)
            }
            Command::SetOffloads(bits) => {
                let may = shared.features() & GUEST_OFFLOADS;
                let fine = shared.has(CTRL_GUEST_OFFLOADS) && bits & !may == 0;
                fine && self.set_offloads(bits)
            }
            Command::Unknown => false,
        }
    }

    fn set_pairs(&self, pairs: u16) -> bool {
        let before = self.shared.pairs();
        // First the device's own view: section 5.1.6.5.6.2 wants no frame in the others once this is answered.
        self.shared.set_pairs(pairs);
        for (pair, lane) in (0u16..).zip(&self.lanes) {
            let mut lane = lock(lane);
            let taken_back = match &mut lane.vhost {
                // Its worker lends what is in use.
                Some(vhost) if pair >= pairs => vhost.stop(),
                _ => Ok(()),
            };
            if let Err(e) = taken_back.and_then(|()| lane.link.set_active(pair < pairs)) {
                self.shared
                    .say("a queue of the link cannot be switched", &e);
                self.shared.set_pairs(before);
                // What was taken back is lent again.
                let _ = lane.rx_timer.reset(Duration::from_nanos(1), None);
                return false;
            }
            // What came before the pair was in use is looked for.
            let _ = lane.rx_timer.reset(Duration::from_nanos(1), None);
        }
        true
    }

    fn set_offloads(&self, bits: u64) -> bool {
        let before = self.shared.offload_bits();
        self.shared.set_offload_bits(Some(bits));
        let Some(first) = self.lanes.first() else {
            return false;
        };
        let set = lock(first)
            .link
            .set_guest_offloads(self.shared.guest_offloads());
        if let Err(e) = set {
            self.shared
                .say("the link cannot be told what the guest can do", &e);
            self.shared.set_offload_bits(before);
            return false;
        }
        true
    }
}

impl Worker for ControlWorker {
    fn name(&self) -> &'static str {
        "virtio-net control"
    }

    fn start(&mut self, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
        ops.watch(
            self.queue.doorbell().event_fd(),
            Token(0),
            Interest::READABLE | Interest::EDGE,
        )
    }

    fn on_event(&mut self, _: Event, _: &mut Ops<'_>) {
        if !self.queue.is_broken()
            && let Err(why) = self.serve()
        {
            self.queue.fail(why);
        }
    }
}

impl QueueWorker for ControlWorker {
    fn stop(self: Box<Self>) -> Vec<Progress> {
        vec![self.queue.stop()]
    }

    fn queues(&self) -> Vec<u16> {
        vec![self.queue.index()]
    }

    fn seat(&self) -> u16 {
        0
    }
}
