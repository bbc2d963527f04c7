use super::*;

struct Echo(Vec<(u64, Vec<u8>)>);

impl BusDevice for Echo {
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Outcome {
        if offset == 7 {
            return Outcome::Refused;
        }
        into.fill(offset as u8);
        Outcome::Done
    }
    fn write(&mut self, offset: u64, from: &[u8]) -> Outcome {
        self.0.push((offset, from.to_vec()));
        Outcome::Asks(MachineRequest::Reset)
    }
}

fn echo() -> SharedDevice {
    Arc::new(Mutex::new(Echo(Vec::new())))
}

#[test]
fn access_reaches_the_device_with_its_own_offset() {
    let mut b = BusBuilder::new();
    b.place("a", 0x3f8, 8, echo()).unwrap();
    b.place("b", 0x60, 1, echo()).unwrap();
    let bus = b.freeze();
    let mut byte = [0];
    assert_eq!(bus.read(0x3fb, &mut byte), Outcome::Done);
    assert_eq!(byte, [3]);
    assert_eq!(bus.write(0x60, &[1]), Outcome::Asks(MachineRequest::Reset));
    assert_eq!(bus.name_at(0x3ff), Some("a"));
    assert_eq!(bus.name_at(0x400), None);
}

#[test]
fn nobody_and_refused_read_all_ones() {
    let mut b = BusBuilder::new();
    b.place("a", 0x3f8, 8, echo()).unwrap();
    let bus = b.freeze();
    for addr in [0, 0x3f7, 0x400, u64::MAX, 0x3ff] {
        let mut word = [0; 2];
        assert_eq!(bus.read(addr, &mut word), Outcome::Refused, "{addr:#x}");
        assert_eq!(word, [0xff; 2]);
    }
    assert_eq!(bus.read(0x3f8, &mut []), Outcome::Refused);
}

#[test]
fn overlap_and_bad_ranges_are_named() {
    let mut b = BusBuilder::new();
    b.place("a", 0x10, 0x10, echo()).unwrap();
    for (start, size) in [(0x0, 0x11), (0x1f, 1), (0x8, 0x100), (0x18, 2)] {
        let e = b.place("b", start, size, echo()).unwrap_err();
        assert!(matches!(e, BusError::Overlap { other: "a", .. }), "{e}");
    }
    assert!(matches!(
        b.place("c", 1, 0, echo()),
        Err(BusError::BadRange { .. })
    ));
    assert!(matches!(
        b.place("c", u64::MAX, 2, echo()),
        Err(BusError::BadRange { .. })
    ));
    b.place("d", 0x20, 1, echo()).unwrap();
    b.place("e", 0xf, 1, echo()).unwrap();
    b.place("f", u64::MAX, 1, echo()).unwrap();
}

mod property {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_table_agrees_with_a_linear_search(
            ranges in prop::collection::vec((0u64..200, 1u64..40), 1..12),
            probes in prop::collection::vec((0u64..260, 1usize..9), 1..40),
        ) {
            let mut b = BusBuilder::new();
            let mut placed: Vec<(u64, u64)> = Vec::new();
            for (start, size) in ranges {
                let free = placed.iter().all(|&(s, l)| start + size - 1 < s || l < start);
                prop_assert_eq!(b.place("x", start, size, echo()).is_ok(), free);
                if free {
                    placed.push((start, start + size - 1));
                }
            }
            let bus = b.freeze();
            for (addr, len) in probes {
                let want = placed.iter().find(|&&(s, l)| s <= addr && addr + len as u64 - 1 <= l);
                let mut buf = vec![0; len];
                let got = bus.read(addr, &mut buf);
                match want {
                    Some(&(s, _)) if addr - s != 7 => {
                        prop_assert_eq!(got, Outcome::Done);
                        prop_assert_eq!(buf[0], (addr - s) as u8);
                    }
                    _ => prop_assert_eq!(got, Outcome::Refused),
                }
            }
        }
    }
}
