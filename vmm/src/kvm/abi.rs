//! KVM's own structures inside saved state: as the bytes of the kernel's ABI, of exactly the right length.

/// For `#[serde(with = "…")]`: a structure of the kernel's ABI as its bytes.
///
/// (kvm-bindings' own implementation pads what is too short and cuts what is too long: not for bytes from a peer.)
pub(crate) mod exact {
    use std::fmt;
    use std::marker::PhantomData;

    use serde::de::{Error, Visitor};
    use serde::{Deserializer, Serializer};
    use zerocopy::{FromBytes, Immutable, IntoBytes};

    /// Writes the structure's bytes.
    pub(crate) fn serialize<T: IntoBytes + Immutable, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(value.as_bytes())
    }

    /// Reads the structure from exactly as many bytes as it has.
    pub(crate) fn deserialize<'de, T: FromBytes, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
        from.deserialize_bytes(Bytes(PhantomData))
    }

    struct Bytes<T>(PhantomData<T>);

    impl<T: FromBytes> Visitor<'_> for Bytes<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{} bytes", size_of::<T>())
        }

        fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<T, E> {
            T::read_from_bytes(bytes).map_err(|_| E::invalid_length(bytes.len(), &self))
        }
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_regs;
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    struct Regs(#[serde(with = "super::exact")] kvm_regs);

    #[test]
    fn a_structure_survives_and_another_length_is_refused() {
        let bytes = godwit_core::codec::encode(&Regs(kvm_regs { rip: 0x1234, ..Default::default() })).unwrap();
        let Regs(regs) = godwit_core::codec::decode(&bytes).unwrap();
        assert_eq!(regs.rip, 0x1234);
        for wrong in [vec![0u8; size_of::<kvm_regs>() - 1], vec![0u8; size_of::<kvm_regs>() + 1], vec![]] {
            let bytes = godwit_core::codec::encode(&wrong).unwrap();
            assert!(godwit_core::codec::decode::<Regs>(&bytes).is_err(), "{} bytes", wrong.len());
        }
    }
}
