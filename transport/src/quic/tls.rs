//! TLS for QUIC: a certificate made at start, known by its fingerprint and by nothing else.
//!
//! There is no name and no authority to check: the URI that the receiver prints carries the SHA-256 of its
//! certificate, and the dialler takes that certificate alone. The certificate's key signs the handshake, and that
//! signature is verified, so showing a copied certificate is not enough.

use std::sync::{Arc, OnceLock};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, PeerIncompatible, SignatureScheme};
use sha2::{Digest, Sha256};

use crate::Fingerprint;

/// The application protocol: whoever offers another one fails in the handshake.
const ALPN: &[u8] = b"godwit/1";

/// The name in the certificate and in the dialler's hello. Nobody checks it.
pub(super) const SERVER_NAME: &str = "godwit";

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A listener's TLS with a fresh certificate, and the certificate's fingerprint.
pub(super) fn server() -> Result<(QuicServerConfig, Fingerprint), BoxError> {
    let certified = rcgen::generate_simple_self_signed([SERVER_NAME.to_owned()])?;
    let certificate = certified.cert.der().clone();
    let fingerprint = fingerprint(&certificate);
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der()));

    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok((QuicServerConfig::try_from(config)?, fingerprint))
}

/// A dialler's TLS that takes only the certificate with this fingerprint, and where it notes another one.
pub(super) fn client(expected: Fingerprint) -> Result<(QuicClientConfig, Arc<OnceLock<Fingerprint>>), BoxError> {
    let provider = Arc::new(ring::default_provider());
    let impostor = Arc::new(OnceLock::new());
    let pinned = Pinned { expected, impostor: Arc::clone(&impostor), provider: Arc::clone(&provider) };
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(pinned))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    // Every channel proves the certificate anew.
    config.resumption = rustls::client::Resumption::disabled();
    Ok((QuicClientConfig::try_from(config)?, impostor))
}

fn fingerprint(certificate: &CertificateDer<'_>) -> Fingerprint {
    Fingerprint(Sha256::digest(certificate).into())
}

/// Takes one certificate, whatever it says.
#[derive(Debug)]
struct Pinned {
    expected: Fingerprint,
    /// The fingerprint of a certificate that was turned down, for the error message.
    impostor: Arc<OnceLock<Fingerprint>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let presented = fingerprint(end_entity);
        if presented == self.expected {
            return Ok(ServerCertVerified::assertion());
        }
        let _ = self.impostor.set(presented);
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // QUIC is TLS 1.3 or nothing.
        Err(PeerIncompatible::Tls13RequiredForQuic.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An impostor that has copied the certificate but not its key.
    #[test]
    fn a_copied_certificate_without_its_key_is_refused() {
        let real = rcgen::generate_simple_self_signed([SERVER_NAME.to_owned()]).unwrap();
        let other_key = rcgen::KeyPair::generate().unwrap();
        let provider = Arc::new(ring::default_provider());
        let pinned = Pinned {
            expected: fingerprint(real.cert.der()),
            impostor: Arc::default(),
            provider: Arc::clone(&provider),
        };
        assert!(
            pinned
                .verify_server_cert(
                    real.cert.der(),
                    &[],
                    &ServerName::try_from(SERVER_NAME).unwrap(),
                    &[],
                    UnixTime::since_unix_epoch(std::time::Duration::ZERO)
                )
                .is_ok(),
            "the certificate alone is the right one"
        );

        let handshake = |key_der: Vec<u8>| {
            let key = provider.key_provider.load_private_key(PrivatePkcs8KeyDer::from(key_der).into()).unwrap();
            let resolver = Arc::new(rustls::sign::SingleCertAndKey::from(rustls::sign::CertifiedKey::new(
                vec![real.cert.der().clone()],
                key,
            )));
            let mut server = rustls::ServerConnection::new(Arc::new(
                rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
                    .with_protocol_versions(&[&rustls::version::TLS13])
                    .unwrap()
                    .with_no_client_auth()
                    .with_cert_resolver(resolver),
            ))
            .unwrap();
            let verifier = Pinned {
                expected: fingerprint(real.cert.der()),
                impostor: Arc::default(),
                provider: Arc::clone(&provider),
            };
            let mut client = rustls::ClientConnection::new(
                Arc::new(
                    rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
                        .with_protocol_versions(&[&rustls::version::TLS13])
                        .unwrap()
                        .dangerous()
                        .with_custom_certificate_verifier(Arc::new(verifier))
                        .with_no_client_auth(),
                ),
                ServerName::try_from(SERVER_NAME).unwrap(),
            )
            .unwrap();
            let mut wire = Vec::new();
            client.write_tls(&mut wire).unwrap();
            server.read_tls(&mut &wire[..]).unwrap();
            server.process_new_packets().unwrap();
            wire.clear();
            server.write_tls(&mut wire).unwrap();
            client.read_tls(&mut &wire[..]).unwrap();
            client.process_new_packets().map(drop)
        };
        assert!(handshake(real.signing_key.serialize_der()).is_ok());
        assert!(handshake(other_key.serialize_der()).is_err());
    }
}
