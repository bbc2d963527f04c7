//! Looks at VMs while the view is shown. One thread asks this host's kernel about all of them; each VM has a thread of its own that
//! asks its monitor and its agent, so that one that does not answer holds up nobody.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use alveole_instance::{Phase, State, Vm, Vms};

use super::rows::Row;
use crate::guests::sample::{OfGuest, OfHost, OfMonitor, Sample, Usage};

/// Whoever was not heard of for so long, and a few looks, has no figures any more.
const STALE: Duration = Duration::from_secs(3);

struct Known {
    vm: Vm,
    phase: Phase,
    before: Sample,
    now: Sample,
    /// Its agent was asked for the first time.
    asked: bool,
}

#[derive(Default)]
struct Shared {
    vms: Mutex<BTreeMap<String, Known>>,
    trouble: Mutex<Option<String>>,
    looks: Mutex<u32>,
}

pub(super) struct Gatherer {
    shared: Arc<Shared>,
    delay: Duration,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gatherer {
    pub(super) fn start(vms: Vms, delay: Duration) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        thread::Builder::new().name("host".into()).spawn(move || {
            loop {
                let begun = Instant::now();
                look(&vms, &own, delay);
                *lock(&own.looks) += 1;
                thread::sleep(delay.saturating_sub(begun.elapsed()));
            }
        })?;
        Ok(Self { shared, delay })
    }

    /// What those that run used between the last two looks.
    pub(super) fn rows(&self) -> Vec<Row> {
        let fresh = |at: Instant| at.elapsed() < STALE + self.delay * 2;
        let known = lock(&self.shared.vms);
        known
            .values()
            .map(|known| {
                let mut now = known.now.clone();
                now.monitor = now.monitor.filter(|monitor| fresh(monitor.at));
                now.guest = now.guest.filter(|guest| fresh(guest.at));
                let answers = now.guest.is_some() || !known.asked;
                let usage = Usage::between(&known.before, &now);
                Row::new(&known.vm, known.phase.phase.clone(), answers, usage)
            })
            .collect()
    }

    /// Why there is nothing new.
    pub(super) fn trouble(&self) -> Option<String> {
        lock(&self.shared.trouble).clone()
    }

    /// Whether there were two looks, of which rates are made.
    pub(super) fn has_rates(&self) -> bool {
        *lock(&self.shared.looks) > 1
    }
}

/// One look at all VMs by this host's kernel; those that are new get a thread.
fn look(vms: &Vms, shared: &Arc<Shared>, delay: Duration) {
    let listed = match vms.list() {
        Ok(listed) => listed,
        Err(e) => {
            *lock(&shared.trouble) = Some(e.to_string());
            return;
        }
    };
    *lock(&shared.trouble) = None;
    let mut kept = BTreeMap::new();
    for vm in listed {
        if let Ok(State::Kept(phase)) = vm.state() {
            let host = OfHost::ask(&phase);
            kept.insert(vm.record.id.clone(), (vm, phase, host));
        }
    }
    let mut new = Vec::new();
    {
        let mut known = lock(&shared.vms);
        known.retain(|id, _| kept.contains_key(id));
        for (id, (vm, phase, host)) in kept {
            let entry = known.entry(id).or_insert_with(|| {
                new.push(vm.clone());
                Known {
                    vm: vm.clone(),
                    phase: phase.clone(),
                    before: Sample::default(),
                    now: Sample::default(),
                    asked: false,
                }
            });
            entry.vm = vm;
            entry.phase = phase;
            entry.before.host = std::mem::replace(&mut entry.now.host, host);
        }
    }
    for vm in new {
        let id = vm.record.id.clone();
        let own = Arc::clone(shared);
        let asks = thread::Builder::new()
            .name("vm".into())
            // It parses some 100 KiB on the heap.
            .stack_size(256 << 10)
            .spawn(move || ask(&vm, &own, delay));
        if let Err(e) = asks {
            // With the next look again.
            lock(&shared.vms).remove(&id);
            *lock(&shared.trouble) = Some(format!("cannot start a thread for a VM: {e}"));
        }
    }
}

/// Asks a VM's monitor and agent until it runs no more.
fn ask(vm: &Vm, shared: &Shared, delay: Duration) {
    loop {
        let begun = Instant::now();
        let monitor = OfMonitor::ask(vm);
        match lock(&shared.vms).get_mut(&vm.record.id) {
            Some(known) => {
                known.before.monitor = std::mem::replace(&mut known.now.monitor, monitor);
            }
            None => return,
        }
        let guest = OfGuest::ask(vm);
        match lock(&shared.vms).get_mut(&vm.record.id) {
            Some(known) => {
                known.before.guest = std::mem::replace(&mut known.now.guest, guest);
                known.asked = true;
            }
            None => return,
        }
        thread::sleep(delay.saturating_sub(begun.elapsed()));
    }
}
