//! One KVM virtual machine: memory slots, in-kernel interrupt controllers, irqfds, ioeventfds.

use std::ffi::CString;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use alveole_guest_memory::{GuestRam, RamRange};
use alveole_hypervisor::{
    CpuidEntry, DoorbellValue, NotedFrom, Partition, PartitionError, PartitionState, RestoredClock,
    VirtualCpu,
};
use alveole_interrupts::{Doorbell, IrqLine, MsiVector};
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MAX_CPUID_ENTRIES,
    KVM_MEM_LOG_DIRTY_PAGES, KVMIO, Msrs, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_enable_cap, kvm_msr_entry, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use crate::KVM_PATH;
use crate::cpu::KvmCpu;
use crate::cpu_state::StateFacts;
use crate::partition_state;
use crate::routing::Routing;

/// The KVM API number; it has been 12 since Linux 2.6.22 and later additions are capabilities.
const API_VERSION: i32 = 12;
/// Three pages that Intel processors want for real mode, in the hole below 4 GiB.
const TSS_ADDR: usize = 0xfffb_d000;
/// What this program cannot do without, and since when Linux has it.
///
/// The youngest only: a KVM that has it has all that is older (in-kernel interrupt controllers, irqfds,
/// extended CPUID), and every question is a system call before the guest's first instruction.
const NEEDED: [(Cap, &str, &str); 1] = [(Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "4.13")];

/// So many pages' notes are cleared by one call, which keeps processors waiting that fault meanwhile: 16 MiB.
const CLEARED_AT_ONCE_PAGES: u64 = 4096;
const PAGE_BYTES: u64 = 4096;

/// What to do when this process is out of file descriptors.
const MORE_FILES: &str = "raise the limit on open files (ulimit -n)";

/// One guest under KVM.
pub struct KvmPartition {
    kvm: Kvm,
    vm: Arc<VmFd>,
    routing: Arc<Routing>,
    /// What every processor takes over from the host: index and value.
    host_msrs: Arc<[(u32, u64)]>,
    facts: OnceLock<Arc<StateFacts>>,
    /// Written pages are noted, all of them to begin with, and nobody has taken them yet.
    all_set: AtomicBool,
}

/// IA32_BIOS_SIGN_ID, AMD PATCH_LEVEL: the microcode revision. A kernel that sees none takes the processor
/// for unpatched, and works around (and complains of) what is mended.
const MSR_MICROCODE_REVISION: u32 = 0x8b;

/// Registers whose value is the host's. KVM gives what it knows (Linux 4.18 and later): none is a
/// necessity, so a host that says nothing is none the worse.
fn host_msrs(kvm: &Kvm) -> Vec<(u32, u64)> {
    let entry = kvm_msr_entry {
        index: MSR_MICROCODE_REVISION,
        ..Default::default()
    };
    let Ok(mut list) = Msrs::from_entries(&[entry]) else {
        return Vec::new();
    };
    let known = kvm.get_msrs(&mut list).unwrap_or(0);
    let known = list.as_slice().iter().take(known);
    known
        .filter(|e| e.data != 0)
        .map(|e| (e.index, e.data))
        .collect()
}

impl KvmPartition {
    /// Opens `/dev/kvm` and makes an empty guest with in-kernel interrupt controllers (local APICs,
    /// I/O APIC with 24 lines, PIC; no PIT: guests take the APIC timer and kvm-clock).
    ///
    /// # Errors
    /// KVM is missing, not accessible, too old, or refuses a guest; the text says what to do.
    pub fn new() -> Result<Self, PartitionError> {
        Self::with_device(KVM_PATH)
    }

    /// The same with another device node.
    ///
    /// # Errors
    /// As [`KvmPartition::new`].
    pub fn with_device(path: &str) -> Result<Self, PartitionError> {
        let kvm = open(path)?;
        check(path, kvm.get_api_version(), |cap| kvm.check_extension(cap))?;
        let vm = loop {
            match kvm.create_vm() {
                // A signal during the (sometimes long) set-up; nothing has been made yet.
                Err(e) if e.errno() == libc::EINTR => {}
                other => {
                    break other.map_err(refused(
                        "making a virtual machine (KVM_CREATE_VM)",
                        "is the host out of memory, or another hypervisor holding the processor?",
                    ))?;
                }
            }
        };
        vm.set_tss_address(TSS_ADDR).map_err(refused(
            "placing the task state pages (KVM_SET_TSS_ADDR)",
            "",
        ))?;
        let host_msrs = host_msrs(&kvm).into();
        let vm = Arc::new(vm);
        Ok(Self {
            kvm,
            routing: Routing::new(vm.clone()),
            vm,
            host_msrs,
            facts: OnceLock::new(),
            all_set: AtomicBool::new(false),
        })
    }
}

impl KvmPartition {
    /// Gives each range of `ram` its memory slot, in order, or changes the flags of that.
    fn set_slots(&self, ram: &GuestRam, flags: u32) -> Result<(), PartitionError> {
        for (slot, (range, host_addr)) in (0u32..).zip(ram.mapped_ranges()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: range.start,
                memory_size: range.size_bytes,
                userspace_addr: host_addr,
            };
            // SAFETY: the range is mapped, and the machine keeps its `GuestRam` for as long as the
            // partition lives; ranges of one `GuestRam` do not overlap.
            unsafe { self.vm.set_user_memory_region(region) }.map_err(refused(
                format!(
                    "showing {} MiB at guest address {:#x} to the guest (KVM_SET_USER_MEMORY_REGION, flags {flags:#x})",
                    range.size_bytes >> 20,
                    range.start
                ),
                "is the guest memory larger than this processor can address?",
            ))?;
        }
        Ok(())
    }
}

/// Noting that begins with all pages noted (Linux Documentation/virt/kvm/api.rst, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2): nothing of the guest's page
/// tables is touched then, but when pages are cleared.
impl KvmPartition {
    /// Whether noting that begins from now on is like that. Clearing has to know, too: large pages are split by it.
    fn begin_with_all_set(&self, on: bool) -> Result<(), PartitionError> {
        let flags = match on {
            true => KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET,
            false => 0,
        };
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            ..Default::default()
        };
        cap.args[0] = flags.into();
        self.vm.enable_cap(&cap).map_err(refused(
            format!(
                "having all pages noted as written (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, {flags})"
            ),
            "",
        ))
    }

    /// Clears the notes of all pages, piece by piece, and tells all pages. What is written to a page from then on is noted.
    fn clear_all(&self, ram: &GuestRam) -> Result<Vec<Vec<u64>>, PartitionError> {
        let mut all = Vec::new();
        for (slot, (range, _)) in (0u32..).zip(ram.mapped_ranges()) {
            let pages = range.size_bytes / PAGE_BYTES;
            let mut first = 0;
            while first < pages {
                let count = CLEARED_AT_ONCE_PAGES.min(pages - first);
                self.clear(slot, first, count).map_err(|source| {
                    let act = format!(
                        "clearing the notes of {count} written pages from guest address {:#x} on (KVM_CLEAR_DIRTY_LOG)",
                        range.start + first * PAGE_BYTES
                    );
                    PartitionError::Refused {
                        act,
                        source,
                        hint: "",
                    }
                })?;
                first += count;
            }
            let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
            let mut bits = vec![u64::MAX; words];
            if let (Some(last), rest @ 1..) = (bits.last_mut(), pages % 64) {
                *last = (1 << rest) - 1;
            }
            all.push(bits);
        }
        self.begin_with_all_set(false)?;
        Ok(all)
    }

    /// Clears the notes of `count` pages of a slot, which begin at a multiple of 64 and are one many, or the last.
    fn clear(&self, slot: u32, first_page: u64, count: u64) -> Result<(), io::Error> {
        let mut bits = [u64::MAX; CLEARED_AT_ONCE_PAGES as usize / 64];
        let log = kvm_clear_dirty_log {
            slot,
            num_pages: u32::try_from(count).unwrap_or(u32::MAX),
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: bits.as_mut_ptr().cast(),
            },
        };
        // SAFETY: the kernel reads a bit for each of at most CLEARED_AT_ONCE_PAGES pages, which `bits` has, and writes nothing.
        match unsafe { ioctl_with_ref(&*self.vm, KVM_CLEAR_DIRTY_LOG(), &log) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

fn open(path: &str) -> Result<Kvm, PartitionError> {
    let name = CString::new(path)
        .map_err(|_| PartitionError::Unavailable(format!("{path:?} is not a path")))?;
    Kvm::new_with_path(name).map_err(|e| {
        let source = io::Error::from(e);
        PartitionError::Unavailable(match source.kind() {
            io::ErrorKind::NotFound => format!(
                "{path} does not exist: this machine offers no KVM; load its module (modprobe kvm-intel or \
                 kvm-amd), switch on virtualisation in the firmware or nested virtualisation in the cloud, \
                 or run in the lab (tools/lab)"
            ),
            io::ErrorKind::PermissionDenied => format!(
                "no permission to open {path}: become a member of the group that owns it \
                 (usermod -aG kvm $USER, then log in again)"
            ),
            _ if e.errno() == libc::EMFILE => format!("cannot open {path}: {source}; {MORE_FILES}"),
            _ => format!("cannot open {path}: {source}; `alveole doctor` says more"),
        })
    })
}

/// Whether a KVM of this API version that `has` these capabilities will do.
fn check(path: &str, version: i32, has: impl Fn(Cap) -> bool) -> Result<(), PartitionError> {
    if version != API_VERSION {
        return Err(PartitionError::Unavailable(format!(
            "{path} is no KVM this program knows: it reports API version {version}, {API_VERSION} is \
             needed; is another program's device at this path?"
        )));
    }
    for (cap, name, since) in NEEDED {
        if !has(cap) {
            return Err(PartitionError::Unavailable(format!(
                "the KVM of this machine is too old: it lacks {name}, which Linux has since {since}; \
                 run a newer kernel"
            )));
        }
    }
    Ok(())
}

/// Makes a [`PartitionError::Refused`] from the error of one ioctl.
pub(crate) fn refused(
    act: impl Into<String>,
    hint: &'static str,
) -> impl FnOnce(kvm_ioctls::Error) -> PartitionError {
    let act = act.into();
    move |e| PartitionError::Refused {
        act,
        hint: if e.errno() == libc::EMFILE {
            MORE_FILES
        } else {
            hint
        },
        source: e.into(),
    }
}

impl Partition for KvmPartition {
    fn map_ram(&mut self, ram: &GuestRam) -> Result<(), PartitionError> {
        self.set_slots(ram, 0)?;
        // Only now: making the controllers starts an RCU grace period at ease, and a memory slot that is
        // set meanwhile waits it out (5 ms measured, against 0.3 ms in this order).
        self.vm.create_irq_chip().map_err(refused(
            "making the interrupt controllers (KVM_CREATE_IRQCHIP)",
            "",
        ))
    }

    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, PartitionError> {
        let list = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused(
                "asking for the processor features that can be offered (KVM_GET_SUPPORTED_CPUID)",
                "",
            ))?;
        Ok(list
            .as_slice()
            .iter()
            .map(|e| CpuidEntry {
                leaf: e.function,
                subleaf: e.index,
                subleaf_matters: e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
                eax: e.eax,
                ebx: e.ebx,
                ecx: e.ecx,
                edx: e.edx,
            })
            .collect())
    }

    fn max_cpus(&self) -> u32 {
        u32::try_from(self.kvm.get_max_vcpus()).unwrap_or(u32::MAX)
    }

    fn has_tsc_deadline_timer(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    fn has_nested_paging(&self) -> bool {
        // Each vendor's module says it; another hypervisor behind /dev/kvm has neither file.
        [
            "/sys/module/kvm_intel/parameters/ept",
            "/sys/module/kvm_amd/parameters/npt",
        ]
        .iter()
        .any(|path| std::fs::read(path).is_ok_and(|text| matches!(text.first(), Some(b'Y' | b'1'))))
    }

    fn has_capability(&self, number: u32) -> bool {
        self.kvm.check_extension_raw(number.into()) > 0
    }

    fn create_cpu(&self, apic_id: u32) -> Result<Box<dyn VirtualCpu>, PartitionError> {
        let fd = self.vm.create_vcpu(u64::from(apic_id)).map_err(refused(
            format!("making processor {apic_id} (KVM_CREATE_VCPU)"),
            "give the guest fewer processors, or raise the limits on files and locked memory",
        ))?;
        let facts = self
            .facts
            .get_or_init(|| Arc::new(StateFacts::ask(&self.kvm, &self.vm)));
        Ok(Box::new(KvmCpu::new(
            fd,
            apic_id,
            self.host_msrs.clone(),
            facts.clone(),
        )))
    }

    fn irq_line(&self, gsi: u32) -> Result<IrqLine, PartitionError> {
        let act = format!("wiring interrupt line {gsi} (KVM_IRQFD)");
        let line = IrqLine::new().map_err(no_descriptor(&act))?;
        self.vm
            .register_irqfd(line.event_fd(), gsi)
            .map_err(refused(act, ""))?;
        Ok(line)
    }

    fn msi_vector(&self) -> Result<MsiVector, PartitionError> {
        let act = "wiring a message-signalled interrupt (KVM_IRQFD)";
        let gsi = self
            .routing
            .take_gsi()
            .ok_or_else(|| PartitionError::Refused {
                act: act.into(),
                source: io::Error::other("every number for one is taken"),
                hint: "give the guest fewer devices or queues",
            })?;
        let line = self.irq_line(gsi)?;
        Ok(MsiVector::new(line, self.routing.connector(gsi)))
    }

    fn doorbell(&self, addr: u64, rings_on: DoorbellValue) -> Result<Doorbell, PartitionError> {
        let act = format!("wiring a doorbell at guest address {addr:#x} (KVM_IOEVENTFD)");
        let bell = Doorbell::new().map_err(no_descriptor(&act))?;
        let at = IoEventAddress::Mmio(addr);
        match rings_on {
            DoorbellValue::Any => self.vm.register_ioevent(bell.event_fd(), &at, NoDatamatch),
            DoorbellValue::Word(value) => self.vm.register_ioevent(bell.event_fd(), &at, value),
        }
        .map_err(refused(act, ""))?;
        Ok(bell)
    }

    fn save(&self) -> Result<PartitionState, PartitionError> {
        partition_state::save(&self.vm)
    }

    fn restore(&self, state: &PartitionState, clock: RestoredClock) -> Result<(), PartitionError> {
        partition_state::restore(&self.vm, state, clock)
    }

    /// Pages are told and forgotten by one call. KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 would have them forgotten by a second call, in pieces: what is written
    /// between a page's copy and that call is then easily lost. So it is on only where noting begins with the first taking, until that.
    fn track_dirty(&self, ram: &GuestRam, from: NotedFrom) -> Result<(), PartitionError> {
        let late = from == NotedFrom::FirstTake && self.begin_with_all_set(true).is_ok();
        self.all_set.store(late, Ordering::Relaxed);
        self.set_slots(ram, KVM_MEM_LOG_DIRTY_PAGES)
    }

    fn take_dirty(&self, ram: &GuestRam) -> Result<Vec<Vec<u64>>, PartitionError> {
        if self.all_set.swap(false, Ordering::Relaxed) {
            return self.clear_all(ram);
        }
        let ranges = (0u32..).zip(ram.mapped_ranges());
        let take = |(slot, (range, _)): (u32, (RamRange, u64))| {
            let act = format!(
                "taking the list of written pages from guest address {:#x} on (KVM_GET_DIRTY_LOG)",
                range.start
            );
            let size_bytes = usize::try_from(range.size_bytes).unwrap_or(usize::MAX);
            self.vm
                .get_dirty_log(slot, size_bytes)
                .map_err(refused(act, "were written pages tracked?"))
        };
        ranges.map(take).collect()
    }

    fn untrack_dirty(&self, ram: &GuestRam) -> Result<(), PartitionError> {
        if self.all_set.swap(false, Ordering::Relaxed) {
            self.begin_with_all_set(false)?;
        }
        self.set_slots(ram, 0)
    }
}

fn no_descriptor(act: &str) -> impl FnOnce(io::Error) -> PartitionError {
    move |source| PartitionError::Refused {
        act: act.to_owned(),
        source,
        hint: MORE_FILES,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kvm_that_is_too_old_is_refused_with_what_it_lacks() {
        check("/dev/kvm", API_VERSION, |_| true).unwrap();
        let lacks = |missing: Cap| move |cap: Cap| cap as u32 != missing as u32;
        let e = check("/dev/kvm", API_VERSION, lacks(Cap::ImmediateExit)).unwrap_err();
        let text = e.to_string();
        for part in ["too old", "KVM_CAP_IMMEDIATE_EXIT", "4.13", "newer kernel"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let e = check("/dev/odd", 11, |_| true).unwrap_err().to_string();
        assert!(
            e.contains("/dev/odd") && e.contains("version 11, 12"),
            "{e}"
        );
    }
}
