use super::images::*;
use super::*;

fn changed(at: usize, value: &[u8]) -> Vec<u8> {
    let mut kernel = bzimage(7);
    kernel[at..at + value.len()].copy_from_slice(value);
    kernel
}

#[test]
fn a_bzimage_lies_where_it_prefers_and_starts_behind_its_32_bit_entry() {
    // With 7 sectors and the boot sector the kernel is mapped, with 4 it has to be copied.
    for setup_sects in [7, 4] {
        let t = Try {
            cmdline: "quiet",
            initrd: Some(&[1]),
            ..Default::default()
        };
        let kernel = bzimage(setup_sects);
        let loaded = t.load(&kernel).unwrap();
        t.check(&loaded);
        assert_eq!(loaded.kind, KernelKind::BzImage);
        assert_eq!(loaded.kernel, 0x100_0000..0x180_0000);
        assert!(matches!(
            loaded.entry,
            EntryState::Long64 {
                rip: 0x100_0200,
                ..
            }
        ));
        let setup = (usize::from(setup_sects) + 1) * 512;
        assert_eq!(t.bytes(0x100_0000, 0x3000), kernel[setup..]);
        assert_eq!(t.bytes(0x100_3000, 0x1000), [0; 0x1000]);

        // The header is the file's but for what a loader writes.
        let mut header = kernel[0x1f1..0x26c].to_vec();
        for (at, value) in [
            (0x210, &[0xff][..]),
            (0x214, &0x100_0000u32.to_le_bytes()),
            (0x218, &0x1ff_f000u32.to_le_bytes()),
            (0x21c, &1u32.to_le_bytes()),
            (0x228, &0x2_0000u32.to_le_bytes()),
            (0x250, &0u64.to_le_bytes()),
        ] {
            header[at - 0x1f1..at - 0x1f1 + value.len()].copy_from_slice(value);
        }
        assert_eq!(t.bytes(0x7000 + 0x1f1, 0x7b), header);
        assert_eq!(
            t.bytes(0x7000 + 0x26c, 0x24),
            [0; 0x24],
            "nothing of what follows the header"
        );
        assert_eq!(t.bytes(0x7000 + 2, 0x6e), [0; 0x6e]);
        assert_eq!(t.e820().len(), 3);
    }
}

#[test]
fn no_sectors_means_four() {
    let mut kernel = bzimage(4);
    kernel[0x1f1] = 0;
    let t = Try::default();
    t.load(&kernel).unwrap();
    assert_eq!(t.bytes(0x100_0000, 0x3000), kernel[5 * 512..]);
}

#[test]
fn alignment_and_relocation_are_respected() {
    let t = Try::default();
    let loaded = t
        .load(&changed(PREF_ADDRESS, &0x10_0001u64.to_le_bytes()))
        .unwrap();
    t.check(&loaded);
    assert_eq!(loaded.kernel, 0x20_0000..0xa0_0000);

    let t = Try::default();
    let loaded = t.load(&changed(0x234, &[0])).unwrap();
    t.check(&loaded);
    assert_eq!(
        loaded.kernel,
        0x10_0000..0x180_0000,
        "from where it is put to where it runs"
    );
    assert!(matches!(
        loaded.entry,
        EntryState::Long64 { rip: 0x10_0200, .. }
    ));
}

#[test]
fn what_is_wrong_with_a_bzimage_is_said() {
    let cases = [
        (
            changed(0x206, &0x20bu16.to_le_bytes()),
            "no 64-bit entry (boot protocol 2.11",
        ),
        (
            changed(0x236, &[0x7e]),
            "boot protocol 2.15, xloadflags 0x7e",
        ),
        (changed(0x201, &[0x61]), "jump is 0x61"),
        (changed(0x211, &[0]), "loadflags is 0x0"),
        (
            changed(0x230, &0x30_0000u32.to_le_bytes()),
            "kernel_alignment is 0x300000",
        ),
        (changed(0x230, &[0; 4]), "kernel_alignment is 0x0"),
        (
            changed(0x230, &(1u32 << 31).to_le_bytes()),
            "kernel_alignment is 0x80000000",
        ),
        (changed(PREF_ADDRESS, &[0; 8]), "pref_address is 0x0"),
        (
            changed(PREF_ADDRESS, &[0xff; 8]),
            "pref_address is 0xffffffffffffffff",
        ),
        (changed(INIT_SIZE, &[0xff; 4]), "init_size is 0xffffffff"),
        (
            changed(INIT_SIZE, &(32u32 << 20).to_le_bytes()),
            "needs guest memory up to 48 MiB",
        ),
        (changed(SYSSIZE, &[0; 4]), "syssize is 0x0"),
        (
            changed(SYSSIZE, &[0xff; 4]),
            "its kernel code would reach to 68719480",
        ),
        (changed(0x1f1, &[255]), "its kernel code would reach to"),
        (
            bzimage(7)[..0x1fff].to_vec(),
            "its kernel code would reach to 16384",
        ),
        (bzimage(7)[..0x240].to_vec(), "is the file complete"),
    ];
    for (kernel, want) in cases {
        let e = Try::default().refusal(&kernel);
        assert!(e.contains(want), "{want} is not in: {e}");
    }
    let e = Try {
        entry: EntryPreference::Pvh,
        ..Default::default()
    }
    .refusal(&bzimage(7));
    assert!(e.contains("has no PVH entry"), "{e}");
}
