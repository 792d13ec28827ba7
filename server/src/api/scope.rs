//! Owns the HTTP side of the calls by which child hubs ask for the identities below them: paths, bodies, statuses. Who may
//! ask and what is answered is decided elsewhere.

use bytes::Bytes;
use edgehub_broker::identity::{SCOPE_REQUEST_BYTES_MAX, ScopeAsk, ScopeCall, ScopeCalls};
use http_body_util::Full;
use hyper::body::Body;
use hyper::header::AUTHORIZATION;
use hyper::{Request, Response, StatusCode};
use percent_encoding::percent_decode_str;

use super::{Api, Refused, failure, with_json};

/// The member that child hubs look for an error in.
const ERROR_MEMBER: &str = "ErrorMessage";

impl Api {
    /// Answers a call of the module `module` on `device`, as they stand in the path.
    pub(super) async fn scope<B>(
        &self,
        scope: &dyn ScopeCalls,
        call: ScopeCall,
        device: &str,
        module: &str,
        request: Request<B>,
    ) -> Response<Full<Bytes>>
    where
        B: Body<Data = Bytes> + Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        match self.identities(scope, call, device, module, request).await {
            Ok(page) => with_json(StatusCode::OK, page),
            Err(refused) => failure(ERROR_MEMBER, refused),
        }
    }

    async fn identities<B>(
        &self,
        scope: &dyn ScopeCalls,
        call: ScopeCall,
        device: &str,
        module: &str,
        request: Request<B>,
    ) -> Result<Bytes, Refused>
    where
        B: Body<Data = Bytes> + Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let _place = self.place()?;
        let (head, body) = request.into_parts();
        let body = self.body(body, SCOPE_REQUEST_BYTES_MAX).await?;
        // Once: an id may hold a plus sign and a per cent sign, and hubs encode once.
        let decoded = |text| {
            percent_decode_str(text)
                .decode_utf8()
                .map_err(|_| Refused::new(StatusCode::BAD_REQUEST, "the path is not UTF-8"))
        };
        let (device, module) = (decoded(device)?, decoded(module)?);
        let authorization = head.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let ask = ScopeAsk { call, device: &device, module: &module, authorization, body: &body };
        scope.answer(ask).await.map_err(|refusal| {
            let status = StatusCode::from_u16(refusal.status()).unwrap_or(StatusCode::UNAUTHORIZED);
            Refused::new(status, refusal.to_string())
        })
    }
}
