// CustomLLM Inference API: its client in JavaScript as its document prints it, but for address and key.
const axios = require('axios');

const apiClient = axios.create({
  baseURL: process.env.URL,
  headers: {
    'Authorization': `Bearer ${process.env.KEY}`,
    'Content-Type': 'application/json'
  }
});

async function generateText(prompt) {
  try {
    const response = await apiClient.post('/predict', {
      prompt: prompt,
      max_length: 100,
      temperature: 0.7
    });

    return response.data;
  } catch (error) {
    console.error('API Error:', error.response.data);
  }
}

// Usage
generateText("Write a haiku about programming:")
  .then(result => console.log(result.generated_text));
