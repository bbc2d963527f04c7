//! Files that nobody meant as kernels: whatever they say, loading ends in an error or in a state that
//! keeps its promises.

use proptest::prelude::*;

use super::images::*;
use super::*;

fn entry() -> impl Strategy<Value = EntryPreference> {
    use EntryPreference::{Auto, Linux64, Pvh};
    prop::sample::select(vec![Auto, Linux64, Pvh])
}

/// Numbers that break arithmetic more often than random ones.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0u32..64).prop_map(|bit| 1 << bit),
        (0u32..64, 0u64..0x2000).prop_map(|(bit, less)| (1u64 << bit).wrapping_sub(less)),
        0u64..0x8000,
    ]
}

/// Overwrites fields of a header: where, which of the widths 1, 2, 4 and 8, what.
fn changes(range: Range<usize>) -> impl Strategy<Value = Vec<(usize, usize, u64)>> {
    prop::collection::vec((range, 0usize..4, number()), 0..5)
}

fn apply(kernel: &mut [u8], changes: &[(usize, usize, u64)]) {
    for &(at, width, value) in changes {
        let value = &value.to_le_bytes()[..1 << width];
        if let Some(into) = kernel.get_mut(at..at + value.len()) {
            into.copy_from_slice(value);
        }
    }
}

fn attempt(kernel: &[u8], entry: EntryPreference, initrd: Option<&[u8]>) {
    let t = Try {
        entry,
        initrd,
        cmdline: "quiet",
        ..Default::default()
    };
    match t.load(kernel) {
        Ok(loaded) => t.check(&loaded),
        Err(e) => assert!(!e.to_string().is_empty()),
    }
}

proptest! {
    #[test]
    fn random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..3000), entry in entry()) {
        attempt(&bytes, entry, None);
        let mut as_elf = vmlinux(&[]);
        as_elf[4..4 + bytes.len()].copy_from_slice(&bytes);
        attempt(&as_elf, entry, None);
        let mut as_bzimage = bzimage(7);
        as_bzimage[..bytes.len().min(0x1f1)].copy_from_slice(&bytes[..bytes.len().min(0x1f1)]);
        attempt(&as_bzimage, entry, None);
    }

    #[test]
    fn elf_with_changed_headers(
        changes in changes(6..64 + 3 * 56 + 8),
        notes in prop::collection::vec(any::<u8>(), 0..64),
        sane_notes in any::<bool>(),
        len in prop_oneof![Just(0x5001usize), 0usize..0x5001],
        entry in entry(),
    ) {
        let sane = [pvh_note(0x100_0040), linux_note()].concat();
        let mut kernel = vmlinux(if sane_notes { &sane } else { &notes });
        apply(&mut kernel, &changes);
        attempt(&kernel[..len], entry, Some(&[1; 100]));
    }

    #[test]
    fn elf_with_changed_notes(changes in changes(0x800..0x840), entry in entry()) {
        let mut kernel = vmlinux(&[linux_note(), pvh_note(0x100_0040)].concat());
        apply(&mut kernel, &changes);
        attempt(&kernel, entry, None);
    }

    #[test]
    fn bzimage_with_changed_header(
        changes in changes(0x1f1..0x270),
        setup_sects in any::<u8>(),
        entry in entry(),
    ) {
        let mut kernel = bzimage(setup_sects.max(3));
        apply(&mut kernel, &changes);
        attempt(&kernel, entry, Some(&[1; 100]));
    }

    #[test]
    fn an_initrd_never_meets_the_kernel(
        mib in 16u64..40,
        len in 1usize..24 << 20,
        last in prop_oneof![Just(0x7fff_ffffu32), 0u32..64 << 20],
    ) {
        let mut kernel = bzimage(7);
        kernel[0x22c..0x230].copy_from_slice(&last.to_le_bytes());
        let initrd = vec![1; len];
        let t = Try { ram: ram(mib), initrd: Some(&initrd), ..Default::default() };
        if let Ok(loaded) = t.load(&kernel) {
            t.check(&loaded);
            let end = loaded.initrd.unwrap().end;
            prop_assert!(end <= u64::from(last) + 1);
        }
    }
}
