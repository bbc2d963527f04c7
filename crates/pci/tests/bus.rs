//! The bus as a kernel walks it, and MSI-X tables as nobody should write them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::sync::{Arc, Mutex};

use alveole_interrupts::{IrqLine, MsiMessage, MsiVector};
use alveole_io_bus::{BusDevice, Outcome};
use alveole_pci::{ConfigSpace, DEVICES, ECAM_BYTES, Ids, MsixTable, PciError, RootBus};
use proptest::prelude::*;

const IDS: Ids = Ids {
    vendor: 0x1234,
    device: 0x5678,
    revision: 9,
    class: 0x01_80_02,
    subsystem_vendor: 0xabcd,
    subsystem: 0xef01,
};

fn word(space: &ConfigSpace, at: u16) -> u32 {
    let mut bytes = [0; 4];
    space.read(at, &mut bytes);
    u32::from_le_bytes(bytes)
}

#[test]
fn a_walk_finds_the_host_bridge_and_what_was_placed() {
    let mut root = RootBus::new();
    let function = Arc::new(Mutex::new(ConfigSpace::new(&IDS)));
    root.place(31, function.clone()).unwrap();
    assert_eq!(root.place(31, function.clone()), Err(PciError::Place(31)));
    assert_eq!(root.place(0, function.clone()), Err(PciError::Place(0)));
    assert_eq!(root.place(DEVICES, function), Err(PciError::Place(32)));
    let mut found = Vec::new();
    for slot in 0..ECAM_BYTES >> 12 {
        let mut id = [0; 4];
        assert_eq!(root.read(slot << 12, &mut id), Outcome::Done);
        if id != [0xff; 4] {
            found.push((slot, u32::from_le_bytes(id)));
        }
    }
    assert_eq!(found, [(0, 0x0008_1b36), (31 << 3, 0x5678_1234)]);
    let mut class = [0; 4];
    let _ = root.read(8, &mut class);
    assert_eq!(u32::from_le_bytes(class), 0x06_00_00_00);
}

#[test]
fn every_width_at_every_offset_agrees_with_the_bytes() {
    let mut root = RootBus::new();
    let mut space = ConfigSpace::new(&IDS);
    space.add_capability(9, &[1, 2, 3, 4, 5], &[]).unwrap();
    root.place(1, Arc::new(Mutex::new(space))).unwrap();
    let at = 1 << 15;
    let mut bytes = vec![0; 0x1000];
    for (offset, byte) in (at..).zip(bytes.iter_mut()) {
        let _ = root.read(offset, std::slice::from_mut(byte));
    }
    assert_eq!(bytes[..4], [0x34, 0x12, 0x78, 0x56]);
    assert_eq!(bytes[0x34], 0x40);
    assert_eq!(bytes[0x40..0x48], [9, 0, 1, 2, 3, 4, 5, 0]);
    assert!(
        bytes[0x100..].iter().all(|b| *b == 0xff),
        "no extended capabilities"
    );
    for width in [2usize, 4] {
        for offset in 0..0x1000 {
            let mut got = vec![0; width];
            let _ = root.read(at + offset as u64, &mut got);
            match bytes.get(offset..offset + width) {
                Some(want) => assert_eq!(got, want, "{offset:#x}"),
                None => assert!(got.iter().all(|b| *b == 0xff), "{offset:#x}"),
            }
        }
    }
    let mut wide = [0; 8];
    assert_eq!(root.read(at, &mut wide), Outcome::Done);
    assert_eq!(wide, [0xff; 8]);
}

#[test]
fn only_what_may_be_written_is_written() {
    let mut space = ConfigSpace::new(&IDS);
    space.add_memory_bar(0, 0x4000_0000, 0x4000).unwrap();
    let at = space.add_capability(5, &[0; 4], &[0x0f, 0]).unwrap();
    let before: Vec<u32> = (0..0x100).step_by(4).map(|at| word(&space, at)).collect();
    for at in (0..0x1000).step_by(4) {
        if !(0x10..0x18).contains(&at) {
            space.write(at, &[0xff; 4]);
        }
    }
    let mut changed = Vec::new();
    for (at, before) in (0..0x100u16).step_by(4).zip(before) {
        let bits = word(&space, at) ^ before;
        if bits != 0 {
            changed.push((at, bits));
        }
    }
    // Command, cache line size, interrupt line, and what the capability allows.
    assert_eq!(
        changed,
        [(4, 0x0546), (0x0c, 0xff), (0x3c, 0xff), (at, 0x0f_0000)]
    );
    assert!(space.decodes_memory());
    space.write(4, &[0]);
    assert!(!space.decodes_memory());
}

#[test]
fn a_bar_shows_its_size_or_its_address() {
    for (addr, size) in [
        (0x4000_0000u64, 0x1000u64),
        (0xc000_0000, 1 << 30),
        (3 << 40, 1 << 33),
        (0x12_3456_8000, 0x8000),
    ] {
        let mut space = ConfigSpace::new(&IDS);
        space.add_memory_bar(2, addr, size).unwrap();
        let read = |space: &ConfigSpace| {
            u64::from(word(space, 0x18)) | (u64::from(word(space, 0x1c)) << 32)
        };
        assert_eq!(read(&space), addr | 4);
        // Both halves at once, as new kernels; one after the other, as old ones.
        space.write(0x18, &[0xff; 4]);
        space.write(0x1c, &[0xff; 4]);
        assert_eq!(read(&space), !(size - 1) | 4);
        space.write(0x18, &((addr & 0xffff_ffff) as u32).to_le_bytes());
        space.write(0x1c, &((addr >> 32) as u32).to_le_bytes());
        assert_eq!((read(&space), space.moves_refused()), (addr | 4, 0));
        // Elsewhere.
        space.write(0x18, &0x5000_0000u32.to_le_bytes());
        space.write(0x1c, &0x0777u32.to_le_bytes());
        assert_eq!(read(&space), addr | 4);
        assert!(space.moves_refused() > 0);
    }
}

#[test]
fn bars_and_capabilities_that_cannot_be_are_refused() {
    let mut space = ConfigSpace::new(&IDS);
    space.add_memory_bar(1, 0x4000, 0x4000).unwrap();
    for (index, addr, size) in [
        (0, 0x8000, 0x4000),
        (2, 0x8000, 0x4000),
        (5, 0x8000, 0x4000),
        (usize::MAX, 0x8000, 0x4000),
        (3, 0x2000, 0x4000),
        (3, 0x6000, 0x6000),
        (3, 0, 0x800),
        (3, 0, 0),
    ] {
        space.add_memory_bar(index, addr, size).unwrap_err();
    }
    space.add_memory_bar(3, 0, 1 << 63).unwrap();
    space.add_capability(9, &[0; 186], &[]).unwrap();
    let full = space.add_capability(9, &[0; 1], &[]);
    assert_eq!(full, Ok(252));
    let none = space.add_capability(9, &[0], &[]).unwrap_err();
    assert_eq!(none.to_string(), "no room for capability 0x9 of 3 bytes");
}

/// Which vector was connected to what, in order.
type Connections = Vec<(usize, Option<MsiMessage>)>;

struct Scene {
    space: ConfigSpace,
    table: MsixTable,
    lines: Vec<IrqLine>,
    connected: Arc<Mutex<Connections>>,
}

/// A function with so many vectors; the hypervisor refuses messages with data `0xbad`.
fn scene(count: usize) -> Scene {
    let connected: Arc<Mutex<Connections>> = Arc::default();
    let lines: Vec<IrqLine> = (0..count).map(|_| IrqLine::new().unwrap()).collect();
    let vectors = lines.iter().enumerate().map(|(index, line)| {
        let log = connected.clone();
        let connect = move |message: Option<MsiMessage>| {
            if message.is_some_and(|m| m.data == 0xbad) {
                return Err(std::io::Error::other("no"));
            }
            log.lock().unwrap().push((index, message));
            Ok(())
        };
        MsiVector::new(line.clone(), Arc::new(connect))
    });
    let mut space = ConfigSpace::new(&IDS);
    space.add_memory_bar(0, 0x4000_0000, 0x8000).unwrap();
    let table = MsixTable::new(vectors.collect(), &mut space, 0, 0x2000, 0x3000).unwrap();
    Scene {
        space,
        table,
        lines,
        connected,
    }
}

impl Scene {
    fn control(&mut self, upper: u8) {
        self.space.write(0x43, &[upper]);
        self.table.follow(&self.space);
    }

    fn set(&mut self, offset: u64, value: u32) {
        assert_eq!(
            self.table.write_table(offset, &value.to_le_bytes()),
            Outcome::Done
        );
    }

    fn connects(&self) -> usize {
        self.connected.lock().unwrap().len()
    }

    fn pending(&self) -> u64 {
        let mut bytes = [0; 8];
        assert_eq!(self.table.read_pending(0, &mut bytes), Outcome::Done);
        u64::from_le_bytes(bytes)
    }
}

const ENABLE: u8 = 0x80;
const MASK: u8 = 0x40;

#[test]
fn the_capability_says_where_the_table_is_and_how_long() {
    let scene = scene(5);
    assert_eq!(word(&scene.space, 0x40), 0x0004_0011);
    assert_eq!(
        (word(&scene.space, 0x44), word(&scene.space, 0x48)),
        (0x2000, 0x3000)
    );
    let mut space = ConfigSpace::new(&IDS);
    let none = MsixTable::new(Vec::new(), &mut space, 0, 0, 0);
    assert_eq!(none.err(), Some(PciError::Vectors(0)));
}

#[test]
fn a_message_is_connected_once_and_only_when_it_can_be_sent() {
    let mut scene = scene(2);
    let sender = scene.table.sender();
    sender.signal(0);
    scene.control(ENABLE | MASK);
    // Filled while masked, in three writes: nothing is connected yet.
    for (offset, value) in [(0, 0xfee0_1003), (4, 1), (8, 0x41), (12, 0)] {
        scene.set(offset, value);
    }
    assert_eq!(scene.connects(), 0);
    scene.control(ENABLE);
    let message = MsiMessage {
        address: 0x1_fee0_1000,
        data: 0x41,
    };
    assert_eq!(*scene.connected.lock().unwrap(), [(0, Some(message))]);
    sender.signal(0);
    assert_eq!(
        scene.lines[0].take_edges(),
        1,
        "what came while disabled is lost"
    );
    // Masks, and even disabling, change nothing in the hypervisor.
    for upper in [ENABLE | MASK, ENABLE, 0, MASK, ENABLE] {
        scene.control(upper);
    }
    for value in [1, 0, 0xffff_ffff, 0xffff_fffe] {
        scene.set(12, value);
    }
    assert_eq!(scene.connects(), 1);
    // Masked, changed and changed back.
    scene.set(12, 1);
    scene.set(8, 0x42);
    scene.set(8, 0x41);
    scene.set(12, 0);
    assert_eq!(scene.connects(), 1);
    // Eight bytes are one change, data and mask among them.
    scene.set(12, 1);
    let both = 0x43u64.to_le_bytes();
    assert_eq!(scene.table.write_table(8, &both), Outcome::Done);
    assert_eq!(scene.connects(), 2);
}

#[test]
fn what_comes_while_masked_is_pending_and_sent_once() {
    let mut scene = scene(2);
    let sender = scene.table.sender();
    scene.control(ENABLE);
    scene.set(16 + 8, 0x50);
    sender.signal(1);
    sender.signal(1);
    sender.signal(7);
    assert_eq!(scene.pending(), 2);
    scene.set(16 + 12, 0);
    assert_eq!((scene.lines[1].take_edges(), scene.pending()), (1, 0));
    scene.control(ENABLE | MASK);
    sender.signal(1);
    assert_eq!((scene.lines[1].take_edges(), scene.pending()), (0, 2));
    scene.control(ENABLE);
    assert_eq!((scene.lines[1].take_edges(), scene.pending()), (1, 0));
    // Disabled, nothing waits.
    scene.control(ENABLE | MASK);
    sender.signal(1);
    scene.control(0);
    sender.signal(1);
    assert_eq!(scene.pending(), 0);
    scene.control(ENABLE);
    assert_eq!(scene.lines[1].take_edges(), 0);
}

#[test]
fn a_line_is_given_away_only_while_its_messages_pass() {
    let mut scene = scene(2);
    let sender = scene.table.sender();
    assert!(sender.open_line(1).is_none(), "disabled");
    scene.control(ENABLE);
    assert!(sender.open_line(1).is_none(), "masked, as all are at first");
    scene.set(16 + 8, 0x50);
    scene.set(16 + 12, 0);
    let line = sender.open_line(1).unwrap();
    line.pulse();
    assert_eq!(scene.lines[1].take_edges(), 1);
    assert!(sender.open_line(0).is_none() && sender.open_line(2).is_none());
    scene.control(ENABLE | MASK);
    assert!(sender.open_line(1).is_none(), "the function is masked");
    scene.control(ENABLE);
    assert!(sender.open_line(1).is_some());
    scene.set(16 + 12, 1);
    assert!(sender.open_line(1).is_none(), "the message is masked");
}

#[test]
fn a_message_that_the_hypervisor_refuses_is_not_sent_as_another() {
    let mut scene = scene(1);
    let sender = scene.table.sender();
    scene.control(ENABLE);
    scene.set(8, 0x41);
    scene.set(12, 0);
    scene.set(8, 0xbad);
    sender.signal(0);
    assert_eq!((scene.lines[0].take_edges(), scene.pending()), (0, 1));
    scene.set(8, 0x42);
    assert_eq!((scene.lines[0].take_edges(), scene.connects()), (1, 2));
}

proptest! {
    #[test]
    fn any_table_is_survived_and_reads_back(
        writes in prop::collection::vec((0u64..0x90, prop::sample::select(vec![1usize, 2, 4, 8]), any::<u64>()), 0..60),
        controls in prop::collection::vec(any::<u8>(), 0..8),
    ) {
        let mut scene = scene(3);
        let sender = scene.table.sender();
        let mut controls = controls.into_iter();
        for (offset, width, value) in writes {
            let bytes = &value.to_le_bytes()[..width];
            let fits = width >= 4 && offset % width as u64 == 0;
            prop_assert_eq!(scene.table.write_table(offset, bytes) == Outcome::Done, fits);
            if let Some(upper) = controls.next() {
                scene.control(upper);
            }
            sender.signal((value & 7) as u16);
            if fits && width == 4 {
                let mut back = [0; 4];
                prop_assert_eq!(scene.table.read_table(offset, &mut back), Outcome::Done);
                let keeps = match offset {
                    48.. => 0,
                    _ if offset % 16 == 0 => !3,
                    _ if offset % 16 == 12 => 1,
                    _ => u32::MAX,
                };
                prop_assert_eq!(u32::from_le_bytes(back), (value as u32) & keeps);
            }
        }
        prop_assert!(scene.pending() < 8);
    }
}
