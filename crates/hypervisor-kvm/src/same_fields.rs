//! Structures of KVM and of the port that differ in nothing but padding.

/// Two functions that carry the fields over, from KVM's structure to ours and back.
macro_rules! same_fields {
    ($there:ident, $back:ident, $kvm:ident, $ours:ident, $($field:ident)+) => {
        fn $there(from: &$kvm) -> $ours {
            $ours { $($field: from.$field),+ }
        }
        fn $back(from: &$ours) -> $kvm {
            let mut to = $kvm::default();
            $(to.$field = from.$field;)+
            to
        }
    };
}
