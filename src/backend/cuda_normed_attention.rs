//! Attention from the projections on: the gradients of q, k and v lie side by side in one matrix, so that those of the
//! projections are one product without a copy. Attention's kernel goes on through the norm, where it can.

use super::cuda::Cuda;
use super::cuda_attention::Norm;
use super::tensor::{empty, primitive, tensor};
use super::{cuda_attention, cuda_qk_norm, views};
use crate::ops::QkNormOps;
use crate::ops::attention::{Attended, Mask};
use crate::ops::normed_attention::{NormedAttentionOps, apart};
use crate::ops::qk_norm::QkNorm;
use burn::tensor::Tensor;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;
use cubecl::zspace::metadata::Metadata;

impl NormedAttentionOps for Cuda {
    fn normed_attention_backward(
        [q, k]: [Tensor<Self, 2>; 2],
        attended: Attended<Self>,
        grad: Tensor<Self, 4>,
        how: &QkNorm<Self>,
        mask: &Mask<Self>,
        scale: f64,
    ) -> [Tensor<Self, 2>; 3] {
        let ([rows, of_q], [_, of_k], shape) = (q.dims(), k.dims(), attended.v.dims());
        let [batch, time, groups, size] = shape;
        if batch * time != rows || groups * size != of_k || attended.q.dims()[1] != time {
            return apart([q, k], attended, grad, how, mask, scale);
        }
        let side = empty(&primitive(q.clone()), [rows, of_q + 2 * of_k], q.dtype());
        let places = [(0, of_q), (of_q, of_k), (of_q + of_k, of_k)]
            .map(|(from, width)| views::columns(&side, from, width));
        let heads_at = |x: &CubeTensor<CudaRuntime>, pitch: usize| {
            let shape = [batch, time, x.meta.shape()[1] / size, size];
            let meta = Metadata::new(shape, [time * pitch, pitch, size, 1]);
            CubeTensor { meta: Box::new(meta), ..x.clone() }
        };
        let heads_of_place = |x: &CubeTensor<CudaRuntime>| heads_at(x, x.meta.strides()[0]);

        if let Some(call) = cuda_qk_norm::Call::new(&q, &k, how) {
            let before = call.rows([&q, &k]).map(|rows| heads_at(&rows.tensor, rows.stride));
            let tables = call.tables.as_ref();
            let tables = tables.map(|rows| (rows.each_ref().map(|rows| rows.tensor.clone()), rows[0].stride));
            let norm = Norm { before, tables, gain: call.gain.clone(), eps: call.eps };
            let places_of_heads = places.each_ref().map(heads_of_place);
            let grads =
                cuda_attention::normed_backward_into(&attended, &grad, mask, scale, places_of_heads, &norm);
            if let Some(grads) = grads {
                if let (Some(gain), Some(parts)) = (&how.gain, &grads.gain_parts)
                    && gain.is_trainable()
                {
                    gain.accumulate::<1>(tensor(call.gain_grad(parts)));
                }
                return places.map(tensor);
            }
        }

        let place = heads_of_place(&places[2]);
        let Some([grad_q, grad_k, _]) =
            cuda_attention::backward_into(&attended, &grad, mask, scale, Some(place))
        else {
            return apart([q, k], attended, grad, how, mask, scale);
        };
        let [grad_q, grad_k] = [grad_q, grad_k].map(tensor);
        let [of_q, of_k, of_v] = places;
        let [grad_q, grad_k] =
            match cuda_qk_norm::backward_into(&q, &k, [&grad_q, &grad_k], how, Some([of_q, of_k])) {
                Some(grads) => grads.map(tensor),
                None => Self::qk_norm_backward(q, k, [grad_q, grad_k], how),
            };
        [grad_q, grad_k, tensor(of_v)]
    }
}
